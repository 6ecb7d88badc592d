"""Models are functions of spec and seed, and checkpoints of what made them."""

import json
from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from bench.cases import models
from bench.cases.data import load
from bench.cases.models import BUILDERS, Network, build, canonical, epochs, find_head, sha256
from bench.cases.scenario import cells, grid_names, load_grid
from bench.errors import UserError
from bench.registry import defenses
from bench.run import network_of
from bench.threat import Defense

GREY, COLOUR = (1, 28, 28), (3, 32, 32)
OWN = '''
import torch
from torch import nn

constant = 3

def flat(image_shape, num_classes, *, width: int = 4, leak=None):
    pixels = image_shape[0] * image_shape[1] * image_shape[2]
    return nn.Sequential(nn.Flatten(), nn.Linear(pixels, width), nn.ReLU(), nn.Linear(width, num_classes))

def anything(image_shape, num_classes, **parameters):
    return flat(image_shape, num_classes, **parameters)

def headless(image_shape, num_classes):
    return nn.Sequential(nn.Conv2d(image_shape[0], num_classes, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())

def no_module(image_shape, num_classes):
    return 3

def loud(image_shape, num_classes):
    raise RuntimeError("first\\nsecond")

def annotated(image_shape, num_classes, *, width: "NowhereDefined" = 4):
    return flat(image_shape, num_classes)

class Tempered(nn.Module):
    """Goes on after its last linear layer."""

    def __init__(self, image_shape, num_classes):
        super().__init__()
        self.body = flat(image_shape, num_classes)

    def forward(self, images):
        return 2 * self.body(images)
'''


@pytest.fixture
def own_models(tmp_path, monkeypatch):
    (tmp_path / "own_models.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "own_models", raising=False)


def refusal(call, *arguments):
    with pytest.raises(UserError) as caught:
        call(*arguments)
    text = str(caught.value)
    assert text.splitlines() == [text]
    return text


# --- architectures


@pytest.mark.parametrize("image_shape", [GREY, COLOUR])
@pytest.mark.parametrize("num_classes", [2, 10])
@pytest.mark.parametrize(
    "spec",
    [
        *("fcn", "fcn(depth=1)", "fcn(depth=4, width=7, activation='tanh', bias=False)"),
        *("lenet", "lenet(init='default', activation='leaky_relu', bias=False)"),
        *("convnet", "convnet(width=3, activation='sigmoid', bias=False)"),
        *("resnet18", "resnet18(stem='imagenet', bias=False)"),
    ],
)
def test_a_model_gives_one_finite_logit_a_class(spec, image_shape, num_classes):
    model = build(spec, image_shape, num_classes, seed=0)
    with torch.no_grad():
        logits = model(torch.rand(2, *image_shape, device="cpu"))
    assert logits.shape == (2, num_classes)
    assert logits.isfinite().all()
    assert not model.training
    head = model.get_submodule(find_head(model))
    assert head.out_features == num_classes
    assert (head.bias is None) == ("bias=False" in spec)


@pytest.mark.parametrize("image_shape", [(1, 5, 5), (3, 17, 30), (1, 8, 6)])
@pytest.mark.parametrize("spec", ["fcn", "lenet", "convnet"])
def test_odd_image_sizes_fit(spec, image_shape):
    assert build(spec, image_shape, 3, seed=0)(torch.rand(1, *image_shape, device="cpu")).shape == (1, 3)


def test_the_first_step_normalises_pixels():
    for spec in BUILDERS:
        first = next(iter(build(spec, COLOUR, 10, seed=0).children()))
        assert isinstance(first, models.Normalize)
    grey = models.Normalize(1)
    assert grey(torch.full((1, 1, 1, 1), 0.1307, device="cpu")).item() == pytest.approx(0, abs=1e-6)
    assert grey(torch.full((1, 1, 1, 1), 0.4388, device="cpu")).item() == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("spec", list(BUILDERS))
def test_the_head_is_the_last_linear_layer(spec):
    model = build(spec, COLOUR, 10, seed=0)
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert find_head(model) == linear[-1] == ("net.fc" if spec == "resnet18" else "head")


# --- weights


@pytest.mark.parametrize("spec", ["fcn", "lenet", "lenet(init='default')", "convnet", "resnet18"])
def test_weights_are_a_function_of_the_seed(spec):
    first, again, other = (sha256(build(spec, GREY, 10, seed)) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_the_hash_covers_names_shapes_and_bytes():
    model = build("fcn(depth=1)", (1, 2, 2), 2, seed=0)
    before = sha256(model)
    with torch.no_grad():
        model.head.weight[0, 0] += 1
    changed = sha256(model)
    assert changed != before
    with torch.no_grad():
        model.normalize.mean += 1
    assert sha256(model) not in (before, changed)


def test_lenets_parameters_are_uniform_between_minus_and_plus_a_half():
    model = build("lenet", COLOUR, 100, seed=0)
    for parameter in model.parameters():
        assert parameter.abs().max() <= 0.5
    drawn = model.head.weight.detach().flatten().double().sort().values + 0.5
    uniform = torch.linspace(0, 1, len(drawn), dtype=torch.float64, device="cpu")
    assert (drawn - uniform).abs().max() < 2 / len(drawn) ** 0.5  # Kolmogorov-Smirnov, once in 1,500


@pytest.mark.parametrize("spec", ["fcn", "convnet", "lenet(init='default')"])
def test_other_parameters_are_within_one_over_the_root_of_the_fan_in(spec):
    for module in build(spec, GREY, 10, seed=0).modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            bound = module.weight[0].numel() ** -0.5
            for parameter in module.parameters():
                assert 0.5 * bound < parameter.abs().max() <= bound * (1 + 1e-6)


def test_resnets_convolutions_are_normal_by_fan_out():
    model = build("resnet18", COLOUR, 10, seed=0)
    weight = model.net.layer4[0].conv2.weight.detach()
    std = (2 / (512 * 9)) ** 0.5
    assert abs(float(weight.std()) / std - 1) < 5 / (2 * weight.numel()) ** 0.5


@pytest.mark.parametrize("spec", ["fcn", "lenet", "resnet18", "own_models:flat"])
def test_building_leaves_the_global_generator_alone(own_models, spec):
    before = torch.random.get_rng_state(), np.random.get_state()[1].tolist()
    build(spec, GREY, 10, seed=5)
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]


# --- specs


def test_a_canonical_spec_has_every_default():
    full = "fcn(depth=3, width=8, activation='relu', bias=True)"
    assert canonical("fcn(width=8)") == full
    assert canonical(full) == full
    assert canonical("resnet18") == "resnet18(bias=True, stem='cifar')"


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("lennet", "no model is named 'lennet'; did you mean lenet"),
        ("fcn(dept=3)", "no parameter 'dept'; did you mean depth?"),
        ("fcn(depth=2.5)", "depth=2.5 should be int"),
        ("fcn(activation='rely')", "'relu', 'leaky_relu', 'sigmoid' or 'tanh'"),
        ("fcn(bias=1)", "bias=1 should be bool"),
        ("not_installed_anywhere:net", "MODULE:CALLABLE"),
        ("own_models:nothing", "MODULE:CALLABLE"),
        ("own_models:flat(depth=3)", "own_models:flat has no parameter 'depth'"),
    ],
)
def test_an_unknown_model_or_parameter_is_one_line(own_models, spec, says):
    assert says in refusal(canonical, spec)
    assert says in refusal(build, spec, GREY, 10, 0)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("fcn(depth=0)", "at least 1"),
        ("fcn(width=-3)", "at least 1"),
        ("convnet(width=0)", "at least 1"),
        ("fcn(width=99999999999999999999)", "fcn(width="),
        ("own_models:headless", "no linear layer"),
        ("own_models:no_module", "int, not a torch.nn.Module"),
        ("own_models:loud", "first second"),
    ],
)
def test_a_model_that_cant_be_built_is_one_line(own_models, spec, says):
    assert says in refusal(build, spec, GREY, 10, 0)


def test_images_too_small_for_lenet_are_one_line():
    assert "at least 5 × 5, got 4 × 9" in refusal(build, "lenet", (1, 4, 9), 10, 0)


# --- models of one's own


@pytest.mark.parametrize("name", ["flat", "anything"])
def test_any_callable_of_a_module_is_a_model(own_models, name):
    model = build(f"own_models:{name}(width=6)", GREY, 10, seed=0)
    assert model[1].out_features == 6
    assert find_head(model) == "3"
    first, again, other = (sha256(build(f"own_models:{name}", GREY, 10, seed)) for seed in (1, 1, 2))
    assert first == again != other


def test_the_canonical_spec_of_a_callable_has_its_defaults(own_models):
    assert canonical("own_models:flat") == "own_models:flat(width=4, leak=None)"


@pytest.mark.parametrize(
    "source", ["x = (", "raise RuntimeError('at import')", "import not_installed_anywhere", "1 / 0"]
)
def test_a_module_that_cant_be_imported_is_one_line(tmp_path, monkeypatch, source):
    (tmp_path / "broken_models.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    assert "broken_models:net" in refusal(canonical, "broken_models:net")


@pytest.mark.parametrize("spec", ["own_models:constant", "own_models:annotated", ".own_models:flat", "..:x"])
def test_what_is_no_callable_that_takes_parameters_is_one_line(own_models, spec):
    refusal(canonical, spec)


def test_a_model_that_goes_on_after_its_head_is_refused(own_models):
    """Its head's gradient is not (p - y) xᵀ with p = softmax(head(x)), as all that computes it has it."""
    assert "head" in refusal(build, "own_models:Tempered", GREY, 10, 0)


# --- what the architecture makes public


@pytest.mark.parametrize(
    ("activation", "nonnegative"), [("relu", True), ("sigmoid", True), ("tanh", False), ("leaky_relu", False)]
)
@pytest.mark.parametrize("builder", ["fcn", "lenet", "convnet"])
def test_features_after_relu_and_sigmoid_are_nonnegative(builder, activation, nonnegative):
    model = build(f"{builder}(activation='{activation}')", GREY, 10, seed=0)
    assert models.nonnegative_features(model, "head", GREY) is nonnegative


def test_a_linear_models_features_are_not():
    assert not models.nonnegative_features(build("fcn(depth=1)", GREY, 10, seed=0), "head", GREY)


@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
def test_a_resnets_pooled_features_are_nonnegative(stem):
    model = build(f"resnet18(stem='{stem}')", COLOUR, 10, seed=0)
    assert models.nonnegative_features(model, "net.fc", COLOUR)


@pytest.mark.parametrize(
    ("between", "nonnegative"),
    [
        ((nn.ReLU(), nn.Dropout()), True),
        ((nn.ReLU(), nn.AvgPool2d(2), nn.Identity()), True),
        ((nn.ReLU(), nn.BatchNorm2d(1)), False),
        ((nn.ReLU(), nn.Conv2d(1, 1, 1)), False),
        ((nn.Tanh(), nn.ReLU()), True),
        ((), False),
    ],
)
def test_the_last_layer_that_can_change_a_sign_decides(between, nonnegative):
    width = 4 if any(isinstance(layer, nn.AvgPool2d) for layer in between) else 16
    model = nn.Sequential(
        OrderedDict(enumerate_names(between), flatten=nn.Flatten(), head=nn.Linear(width, 2))
    )
    assert models.nonnegative_features(model, "head", (1, 4, 4)) is nonnegative


def enumerate_names(layers):
    return {f"layer{index}": layer for index, layer in enumerate(layers)}


def test_looking_at_the_architecture_leaves_the_model_as_it_was():
    model = build("resnet18", COLOUR, 10, seed=0).train()
    model.net.bn1.eval()  # as where a part is frozen
    before = sha256(model), [module.training for module in model.modules()]
    models.nonnegative_features(model, "net.fc", COLOUR)
    assert before == (sha256(model), [module.training for module in model.modules()])
    assert not any(module._forward_pre_hooks for module in model.modules())


# --- training


@pytest.fixture
def dataset(tmp_path):
    """Three classes of 10 grey images, 6 × 6, told apart by where they are bright."""
    rng = np.random.default_rng(0)
    labels = np.arange(30) % 3
    images = rng.integers(0, 100, (30, 6, 6), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[2 * label : 2 * label + 2] += 150
    np.savez(tmp_path / "tiny.npz", images=images, labels=labels)
    return load(f"npz:{tmp_path / 'tiny.npz'}")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("LEAKBENCH_CACHE", str(folder))
    return folder


@pytest.fixture
def wanted(dataset):
    spec = "fcn(depth=2, width=8)"
    return Network(canonical(spec), dataset.name, dataset.sha256, "epochs=2", 0)


@pytest.fixture
def trained(dataset, cache):
    return lambda wanted: models.network(wanted, dataset, defenses.make("none"))


def checkpoint(cache, wanted):
    return cache / "weights" / f"{wanted.key}.safetensors"


def report(cache, wanted):
    return json.loads(checkpoint(cache, wanted).with_suffix(".json").read_text())


def clear(cache):
    for path in (cache / "weights").iterdir():
        path.unlink()


def test_untrained_weights_are_built_and_not_stored(wanted, trained, cache, dataset):
    untrained = replace(wanted, weights="untrained")
    assert models.is_cached(untrained)
    model = trained(untrained)
    assert sha256(model) == sha256(build(wanted.model, dataset.image_shape, 3, 0))
    assert not cache.exists()


def test_training_is_deterministic_however_many_threads_there_are(wanted, trained, cache):
    first = sha256(trained(wanted))
    clear(cache)
    torch.set_num_threads(2)
    again = sha256(trained(wanted))
    assert torch.get_num_threads() == 2
    assert first == again
    assert first != sha256(trained(replace(wanted, weight_seed=1)))
    assert first != sha256(trained(replace(wanted, weights="epochs=1")))


def test_training_leaves_the_global_generator_alone_and_no_gradients(wanted, trained):
    before = torch.random.get_rng_state()
    model = trained(wanted)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not model.training
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_a_checkpoint_is_made_once(wanted, trained, cache, monkeypatch):
    assert not models.is_cached(wanted)
    first = sha256(trained(wanted))
    assert models.is_cached(wanted)
    monkeypatch.setattr(models, "train", None)
    assert sha256(trained(wanted)) == first


def test_its_record_says_accuracy_mean_confidence_and_what_made_it(wanted, trained, cache, dataset):
    model = trained(wanted)
    said = report(cache, wanted)
    with torch.no_grad():
        p = model(dataset.pixels(dataset.held_out)).softmax(1)
    labels = dataset.labels[dataset.held_out]
    assert said["accuracy"] == float((p.argmax(1) == labels).double().mean())
    assert said["mean_confidence"] == pytest.approx(float(p.amax(1).double().mean()), rel=1e-12)
    assert said["epochs"] == 2
    assert said["training_examples"] == len(dataset.training)
    assert said["sha256"] == sha256(model)
    assert {**said, "model": wanted.model, "data_sha256": dataset.sha256, "weights": "epochs=2"} == said


def test_training_learns(wanted, trained, cache):
    wanted = replace(wanted, weights="epochs=200")
    trained(wanted)
    assert report(cache, wanted)["training_accuracy"] == 1.0


@pytest.mark.parametrize("kept", [0, 5, 0.5, -1], ids=["empty", "five bytes", "half", "all but one byte"])
def test_a_checkpoint_that_is_cut_short_is_made_again(wanted, trained, cache, kept):
    first = sha256(trained(wanted))
    path = checkpoint(cache, wanted)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept) if kept == 0.5 else kept])
    assert sha256(trained(wanted)) == first
    assert path.read_bytes() == content


def test_a_checkpoint_with_a_flipped_bit_is_made_again(wanted, trained, cache):
    first = sha256(trained(wanted))
    path = checkpoint(cache, wanted)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    assert sha256(trained(wanted)) == first


@pytest.mark.parametrize("change", ["missing", "misshapen"])
def test_a_checkpoint_that_fits_in_part_leaves_nothing_of_itself(wanted, trained, cache, change):
    first = sha256(trained(wanted))
    state = {name: value + 1 for name, value in trained(wanted).state_dict().items()}
    if change == "missing":
        del state["head.bias"]
    else:
        state["head.bias"] = torch.zeros(7, device="cpu")
    checkpoint(cache, wanted).write_bytes(safetensors.torch.save(state))
    assert sha256(trained(wanted)) == first


def test_a_record_that_is_missing_is_made_again(wanted, trained, cache):
    """As where the process was killed between writing the checkpoint and its record."""
    trained(wanted)
    checkpoint(cache, wanted).with_suffix(".json").unlink()
    trained(wanted)
    assert report(cache, wanted)["epochs"] == 2


def test_no_file_is_left_half_written(wanted, trained, cache):
    trained(wanted)
    names = {path.suffix for path in (cache / "weights").iterdir()}
    assert names <= {".safetensors", ".json", ".lock"}


@dataclass(frozen=True)
class Wider(Defense):
    """Puts a layer before the head."""

    name: ClassVar[str] = "wider"
    title: ClassVar[str] = "wider"

    def prepare(self, model, rng):
        parts = OrderedDict(model.named_children())
        head = parts.pop("head")
        return nn.Sequential(OrderedDict(**parts, wide=nn.Linear(8, 8), relu=nn.ReLU(), head=head))


def test_a_defense_changes_the_architecture_before_training(wanted, dataset, cache, trained):
    other = replace(wanted, defense="wider")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = models.network(other, dataset, Wider())
    assert "wide.weight" in safetensors.torch.load_file(checkpoint(cache, other))
    assert model.wide.weight.grad is None
    assert checkpoint(cache, other) != checkpoint(cache, wanted)


def test_every_part_of_a_network_enters_its_key(wanted):
    others = [
        replace(wanted, **{name: value})
        for name, value in {
            **dict.fromkeys(("model", "dataset", "data_sha256", "weights", "defense"), "other"),
            "weight_seed": 7,
        }.items()
    ]
    assert len({network.key for network in [wanted, *others]}) == 7


@pytest.mark.parametrize(("state", "count"), [("untrained", 0), ("epochs=1", 1), ("epochs=37", 37)])
def test_states_say_how_many_epochs(state, count):
    assert epochs(state) == count


def test_trained_is_a_fixed_number_of_epochs():
    assert epochs("trained") == models.EPOCHS_TRAINED


@pytest.mark.parametrize(
    "state", ["", "epochs", "epochs=", "epochs=-1", "epochs=1.5", "epochs=1\n", "Trained", "epochs=10000000"]
)
def test_another_state_is_one_line(state):
    assert "give untrained, epochs=N or trained" in refusal(epochs, state)


# --- frozen grids -----------------------------------------------------------------------------------------


def test_committed_weights_come_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "COMMITTED", tmp_path)
    wanted = models.Network("fcn(depth=2, width=8)", "mnist5k", "sha", "epochs=3", 0)
    small = load("mnist5k")
    drawn = models.build(wanted.model, small.image_shape, small.num_classes, seed=77).eval()
    (tmp_path / f"{wanted.key}.safetensors").write_bytes(safetensors.torch.save(drawn.state_dict()))
    (tmp_path / f"{wanted.key}.json").write_text(json.dumps({"sha256": models.sha256(drawn)}))
    assert models.is_cached(wanted)
    found = models.network(wanted, small, defenses.make("none"))
    assert models.sha256(found) == models.sha256(drawn)


@pytest.mark.parametrize("name", [name for name in grid_names() if load_grid(name).weights_sha256])
def test_the_trained_networks_of_a_frozen_grid_are_the_committed_ones(name):
    grid = load_grid(name)
    for key, expected in grid.weights_sha256.items():
        assert json.loads((models.COMMITTED / f"{key}.json").read_text())["sha256"] == expected
    for file in {scenario.dataset for scenario, _ in cells(grid) if ":" in scenario.dataset}:
        try:
            load(file)
        except UserError as error:
            pytest.skip(f"its images don't come with the install: {error}")
    networks = {network_of(scenario, None) for scenario, _ in cells(grid)}
    trained = {network.key: network for network in networks if models.epochs(network.weights)}
    assert trained.keys() == grid.weights_sha256.keys()
    for key, network in trained.items():
        made = models.network(network, load(network.dataset), defenses.make(network.defense))
        assert models.sha256(made) == grid.weights_sha256[key]
