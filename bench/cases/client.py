"""The client: one FedSGD step on its batch, restricted to what is read of it.

N = batch size, M = batches in a stack, K = classes, D = width of the head's input.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, replace_all_batch_norm_modules_, vmap
from torch.nn import functional as F

from bench.cases.models import find_head
from bench.threat import Batch, Update

EXAMPLES_AT_ONCE = 32
"""How many per-example gradients are held at a time beside the result."""


IMAGES_AT_ONCE = 512
"""How many images go through the body together: their activations are in memory."""


def soft_cross_entropy(logits: Tensor, soft_labels: Tensor) -> Tensor:
    """(N, K), (N, K) -> the mean over examples of -Σ_k y_k log softmax(z)_k, a scalar."""
    return -(soft_labels * F.log_softmax(logits, dim=-1)).sum(-1).mean()


@dataclass(frozen=True, eq=False)
class FedSGDClient:
    """A client that sends the gradient of its batch's mean soft cross-entropy.

    Attributes:
        model: in the client's mode.
        pool: what it holds beside its batch, for defenses.
    """

    model: nn.Module
    pool: Batch | None = None

    @classmethod
    def with_batch_norm(cls, model: nn.Module, mode: str) -> FedSGDClient:
        """A client on a copy of the model: `eval` uses stored statistics, `train` those of the batch alone.

        In train mode the stored statistics are dropped, so that one step leaves the public model as it was.
        """
        own = copy.deepcopy(model)
        if mode == "train":
            own = replace_all_batch_norm_modules_(own).train()
            for module in own.modules():
                if isinstance(module, nn.modules.dropout._DropoutNd):  # nothing seeds what it draws
                    module.eval()
        return cls(own)

    @property
    def head(self) -> str:
        """The module name of the last linear layer."""
        return find_head(self.model)

    @cached_property
    def _body(self) -> nn.Module:
        """The model without its head: images -> features."""
        parent_name, _, leaf = self.head.rpartition(".")
        body = copy.deepcopy(self.model)
        setattr(body.get_submodule(parent_name), leaf, nn.Identity())
        return body

    @contextmanager
    def head_inputs(self) -> Iterator[list[Tensor]]:
        """The features (N, D) that reach the head while this is open, one entry a forward pass."""
        passed: list[Tensor] = []
        hook = self.model.get_submodule(self.head).register_forward_pre_hook(
            lambda module, inputs: passed.append(inputs[0].detach())
        )
        try:
            yield passed
        finally:
            hook.remove()

    def gradient(self, batch: Batch) -> Update:
        """Parameter name -> gradient, of the parameter's shape; a frozen parameter is not sent."""
        parameters = {name: value for name, value in self.model.named_parameters() if value.requires_grad}
        loss = soft_cross_entropy(self.model(batch.images), batch.soft_labels)
        gradients = torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True)
        return dict(zip(parameters, gradients, strict=True))

    def example_gradients(self, batch: Batch) -> Update:
        """Parameter name -> (N, *shape): one gradient an example, each as a batch of one."""
        named = dict(self.model.named_parameters())
        parameters = {name: value.detach() for name, value in named.items() if value.requires_grad}

        def loss(weights: dict[str, Tensor], image: Tensor, soft_label: Tensor) -> Tensor:
            logits = functional_call(self.model, weights, (image[None],))
            return soft_cross_entropy(logits, soft_label[None])

        each = vmap(grad(loss), in_dims=(None, 0, 0), chunk_size=EXAMPLES_AT_ONCE, randomness="different")
        return each(parameters, batch.images, batch.soft_labels)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """(M, N, C, H, W) -> (M, N, D), the head's inputs; each batch's statistics are its own."""
        if self.model.training:
            return vmap(self._body, randomness="different")(images)
        parts = images.flatten(0, 1).split(IMAGES_AT_ONCE)
        return torch.cat([self._body(part) for part in parts]).unflatten(0, images.shape[:2])

    def head_updates(self, features: Tensor, soft_labels: Tensor) -> Update:
        """The head's entries of the updates of M batches, from (M, N, D) features and (M, N, K) labels.

        ∇W = (1/N) Σ_n u_n x_nᵀ and ∇b = (1/N) Σ_n u_n: parameter name -> (M, K, D) and, where the head has
        a bias, (M, K). u comes from the same derivative of the loss that a whole backward pass takes.
        """
        head = self.model.get_submodule(self.head)
        assert isinstance(head, nn.Linear)
        with torch.no_grad():
            logits = F.linear(features, head.weight, head.bias)  # (M, N, K)
        logits.requires_grad_(True)
        loss = -(soft_labels * F.log_softmax(logits, dim=-1)).sum()
        (u,) = torch.autograd.grad(loss, logits)
        n = features.shape[1]
        update = {f"{self.head}.weight": torch.einsum("mnk,mnd->mkd", u / n, features)}
        if head.bias is not None:
            update[f"{self.head}.bias"] = (u / n).sum(1)
        return update
