import copy
import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import pytest

from spar.common.config import by_kind, from_dict, read_json, to_dict, write_json
from spar.common.errors import InputError
from spar.models.config import (
    AutoencoderConfig,
    ConnectorConfig,
    DenoiserConfig,
    RouterConfig,
    SparConfig,
    StreamConfig,
    TextConfig,
    VisionConfig,
)
from spar.recipes import OBJECTIVES, RECIPES, REGISTRY, SOURCES, STAGE_DATA, SYSTEMS, recipe
from spar.training.config import Recipe, StageConfig
from spar.training.data import CaptionData, DataConfig, StageData
from spar.training.objectives.base import Objective
from spar.training.objectives.dit import DitObjective

STAGE = {
    "name": "dit", "objective": {"kind": "dit"}, "data": {"kind": "captions"}, "trainable": ["model.denoiser.*"],
    "steps": 3, "warmup": 1,
}  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_survives_a_json_file(name, tmp_path):
    write_json(tmp_path / "recipe.json", to_dict(recipe(name)))
    assert from_dict(Recipe, read_json(tmp_path / "recipe.json"), registry=REGISTRY) == recipe(name)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_carries_the_name_it_is_known_by(name):
    assert recipe(name).name == name


def test_an_unknown_recipe_is_refused_with_the_known_ones():
    with pytest.raises(InputError, match="unknown recipe 'shape'; expected one of shapes, "):
        recipe("shape")


def test_a_field_that_is_not_given_keeps_its_default():
    config = from_dict(SparConfig, {"text": {"layers": 9}})
    assert config == SparConfig(text=TextConfig(layers=9))


def test_a_complete_file_leaves_no_field_out_at_any_depth():
    whole = to_dict(SparConfig())
    assert from_dict(SparConfig, whole, complete=True) == SparConfig()
    for path in places(whole):
        short = copy.deepcopy(whole)
        inner = short
        for key in path[:-1]:
            inner = inner[key]
        del inner[path[-1]]
        with pytest.raises(InputError, match=f"missing field {path[-1]}$"):
            from_dict(SparConfig, short, complete=True)
    with pytest.raises(InputError, match=r"Outer.rows\[0\]: missing field width"):
        from_dict(Outer, {"inner": None, "rows": [{}]}, complete=True)


def places(values: dict, path: tuple = ()) -> list[tuple]:
    """The path of every field of a nested dictionary, inner ones too."""
    found = []
    for key, value in values.items():
        found.append((*path, key))
        if isinstance(value, dict):
            found += places(value, (*path, key))
    return found


def replaced(values: dict, path: tuple, value: object) -> dict:
    inner = changed = copy.deepcopy(values)
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return changed


DIT = StageConfig("s", DitObjective(), ("a",), 1, data=CaptionData(), warmup=0)
WHOLE = to_dict(dataclasses.replace(recipe("tiny"), stages=(DIT,)))
FIELDS = [
    (cls, values, path) for cls, values in ((Recipe, WHOLE), (StageConfig, to_dict(DIT))) for path in places(values)
]


@pytest.mark.parametrize(("cls", "values", "path"), FIELDS, ids=lambda v: ".".join(v) if isinstance(v, tuple) else "")
def test_every_field_refuses_a_value_of_another_kind_and_says_where(cls, values, path):
    for odd in ({"odd": 1}, [{"odd": 1}], object()):
        with pytest.raises(InputError) as caught:
            from_dict(cls, replaced(values, path, odd), registry=REGISTRY)
        assert ".".join((cls.__name__, *path)) in str(caught.value)


@pytest.mark.parametrize("path", [(), ("model",), ("model", "text"), ("flow",), ("alignment",), ("data",)])
def test_an_unknown_field_is_refused_at_every_depth_with_the_known_ones(path):
    with pytest.raises(InputError, match=r"unknown field typo; known fields are \w+, \w+"):
        from_dict(Recipe, replaced(WHOLE, (*path, "typo"), 1), registry=REGISTRY)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": "3"}, "StageConfig.steps: expected int, got '3'"),
        ({"steps": 3.0}, "StageConfig.steps: expected int, got 3.0"),
        ({"steps": True}, "StageConfig.steps: expected int, got True"),
        ({"steps": None}, "StageConfig.steps: expected int, got None"),
        ({"lr": "1e-3"}, "StageConfig.lr: expected float, got '1e-3'"),
        ({"lr": True}, "StageConfig.lr: expected float, got True"),
        ({"name": 7}, "StageConfig.name: expected str, got 7"),
        ({"objective": {"kind": "dits"}}, "StageConfig.objective.kind: expected one of autoencoder, .*, got 'dits'"),
        ({"objective": {}}, "StageConfig.objective.kind: expected one of autoencoder, .*, got None"),
        ({"data": {"kind": "shapes"}}, "StageConfig.data.kind: expected one of captions, .*, got 'shapes'"),
        ({"trainable": "model.*"}, r"StageConfig.trainable: expected a list, got 'model.\*'"),
        ({"trainable": [1]}, r"StageConfig.trainable\[0\]: expected str, got 1"),
        ({"betas": [0.9]}, "StageConfig.betas: expected 2 values, got 1"),
        ({"betas": [0.9, "x"]}, r"StageConfig.betas\[1\]: expected float, got 'x'"),
        ({"lr_multipliers": [["a", 0.1], ["b"]]}, r"StageConfig.lr_multipliers\[1\]: expected 2 values, got 1"),
        ({"objective": [1]}, "StageConfig.objective: expected an object with fields, got list"),
        ({"objective": {"kind": "tokenizer", "mse": "a"}}, "StageConfig.objective.mse: expected float, got 'a'"),
        ({"objective": {"kind": "tokenizer", "mse": -1}}, "StageConfig.objective: mse: expected at least 0, got -1.0"),
        # What another kind reads is unknown, not idle.
        ({"objective": {"kind": "dit", "align": 1.0}}, "unknown field align; known fields are noise_samples"),
        ({"data": {"kind": "images", "edit_share": 0.1}}, "unknown field edit_share; known fields are image_size"),
    ],
)
def test_a_wrong_kind_is_named_with_what_was_expected_and_what_came(change, message):
    with pytest.raises(InputError, match=message):
        from_dict(StageConfig, {**STAGE, **change}, registry=REGISTRY)


def test_a_missing_field_is_named():
    with pytest.raises(InputError, match="steps"):
        from_dict(StageConfig, {key: value for key, value in STAGE.items() if key != "steps"}, registry=REGISTRY)


def test_a_whole_number_stands_for_a_float_and_lists_become_tuples():
    change = {"lr": 1, "betas": [0, 0.5], "lr_multipliers": [["model.*", 1]]}
    stage = from_dict(StageConfig, {**STAGE, **change}, registry=REGISTRY)
    assert stage.lr == 1.0 and type(stage.lr) is float
    assert stage.betas == (0.0, 0.5) and stage.lr_multipliers == (("model.*", 1.0),)
    assert all(type(beta) is float for beta in stage.betas)
    assert stage.trainable == ("model.denoiser.*",)


def test_what_a_class_refuses_in_its_own_way_is_input_too():
    @dataclass(frozen=True)
    class Odd:
        size: int = 1

        def __post_init__(self):
            if self.size % 2 == 0:
                raise ValueError("expected an odd size")

    with pytest.raises(InputError, match="there.odd: expected an odd size"):
        from_dict(Odd, {"size": 2}, "there.odd")


def test_an_optional_field_takes_none_or_its_kind():
    assert from_dict(DenoiserConfig, {"interpolation_scale": None}).interpolation_scale is None
    assert from_dict(DenoiserConfig, {"interpolation_scale": 2}).interpolation_scale == 2.0
    with pytest.raises(InputError, match="interpolation_scale: expected float, got 'no'"):
        from_dict(DenoiserConfig, {"interpolation_scale": "no"})


@dataclass(frozen=True)
class Inner:
    width: int = 1


@dataclass(frozen=True)
class Outer:
    inner: Inner | None = None
    rows: tuple[Inner, ...] = ()


def test_dataclasses_inside_options_and_tuples_are_rebuilt():
    outer = Outer(Inner(3), (Inner(4), Inner(5)))
    assert from_dict(Outer, to_dict(outer)) == outer
    with pytest.raises(InputError, match=r"Outer.rows\[1\]: unknown field depth"):
        from_dict(Outer, {"rows": [{}, {"depth": 1}]})


# ---- kinds -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """A base of kinds: no kind itself."""


@dataclass(frozen=True)
class Disc(Shape):
    kind: ClassVar[str] = "disc"
    radius: float = 1.0


@dataclass(frozen=True)
class Box(Shape):
    kind: ClassVar[str] = "box"
    sides: tuple[float, float] = (1.0, 1.0)


@dataclass(frozen=True)
class Scene:
    shape: Shape
    kind: str = "a field, not a kind"


KINDS = {Shape: by_kind((Disc, Box))}


@pytest.mark.parametrize("shape", [Disc(2.0), Box((1.0, 3.0))])
def test_a_kind_stands_beside_the_fields_and_finds_its_class_again(shape):
    values = to_dict(Scene(shape))
    assert values["shape"]["kind"] == shape.kind and values["kind"] == "a field, not a kind"
    again = from_dict(Scene, values, complete=True, registry=KINDS)
    assert again == Scene(shape) and type(again.shape) is type(shape)
    assert from_dict(Shape, to_dict(shape), complete=True, registry=KINDS) == shape
    assert from_dict(type(shape), to_dict(shape), complete=True) == shape  # what is expected needs no table


def test_a_kind_that_is_unknown_or_left_out_is_refused_with_the_known_ones():
    for kind in ("ring", 3, None, ["disc"], {"kind": "disc"}):
        with pytest.raises(InputError, match="Scene.shape.kind: expected one of disc, box, got "):
            from_dict(Scene, {"shape": {"kind": kind}}, registry=KINDS)
    with pytest.raises(InputError, match="Scene.shape.kind: expected one of disc, box, got None"):
        from_dict(Scene, {"shape": {"radius": 2.0}}, registry=KINDS)
    with pytest.raises(InputError, match="Disc.kind: expected one of disc, got 'box'"):
        from_dict(Disc, {"kind": "box"})
    with pytest.raises(InputError, match="Scene.shape: unknown field sides; known fields are radius"):
        from_dict(Scene, {"shape": {"kind": "disc", "sides": [1.0, 1.0]}}, registry=KINDS)


def test_two_classes_of_one_kind_are_a_mistake_of_the_program():
    @dataclass(frozen=True)
    class Other:
        kind: ClassVar[str] = "disc"

    with pytest.raises(ValueError, match="two classes of kind 'disc': Disc and Other"):
        by_kind((Disc, Box, Other))


def test_every_kind_of_a_recipe_can_be_named_in_a_file():
    for base, classes in ((Recipe, SYSTEMS), (Objective, OBJECTIVES), (DataConfig, SOURCES), (StageData, STAGE_DATA)):
        assert all(issubclass(cls, base) for cls in classes)
        assert {cls.kind: cls for cls in classes} == REGISTRY[base]
    used = [part for name in RECIPES for s in recipe(name).stages for part in (s.objective, s.data)]
    used += [part for name in RECIPES for part in (recipe(name), recipe(name).data)]
    assert {type(part) for part in used} <= {*SYSTEMS, *OBJECTIVES, *SOURCES, *STAGE_DATA}


@pytest.mark.parametrize(("path", "known"), [(("kind",), "dualtoken, spar"), (("data", "kind"), "files, none, shapes")])
def test_a_recipe_of_an_unknown_kind_is_refused_with_the_known_kinds(path, known):
    where = ".".join(("Recipe", *path))
    with pytest.raises(InputError, match=f"{where}: expected one of {known}, got 'unheard'"):
        from_dict(Recipe, replaced(WHOLE, path, "unheard"), complete=True, registry=REGISTRY)


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "{", "[1]", "3", "\x00", '{"a": 1} trailing'])
def test_a_file_that_holds_no_json_object_is_refused_by_name(tmp_path, text):
    path = tmp_path / "odd.json"
    path.write_text(text)
    with pytest.raises(InputError, match="odd.json"):
        read_json(path)


def test_a_file_that_is_missing_binary_or_a_folder_is_refused_by_name(tmp_path):
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "folder.json").mkdir()
    for name, message in (("none", "is missing in"), ("binary", "not readable"), ("folder", "not readable")):
        with pytest.raises(InputError, match=message):
            read_json(tmp_path / f"{name}.json")


# ---- sizes that contradict each other -------------------------------------------------------------------------------

TEXT = TextConfig(hidden_size=160, layers=8, heads=5, kv_heads=5, vocab_size=128)

@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SparConfig(vision=VisionConfig(patch_size=4, image_size=60)), "expected a multiple of 8 .*got 60"),
        (lambda: SparConfig(text=TEXT, router=RouterConfig(count=9)), "expected at most 8 LLM layers, got 9"),
        (lambda: SparConfig(text=TEXT, connector=ConnectorConfig(layers=9)), "layers: expected at most 8, got 9"),
        (lambda: SparConfig(text=TEXT, streams=StreamConfig(pixel_heads=3)), "divisor of text.hidden_size 160, got 3"),
        (lambda: DenoiserConfig(layers=2, align_depth=3), "expected 1 to 2, got 3"),
        (lambda: DenoiserConfig(layers=6, align_depth=0), "expected 1 to 6, got 0"),
        (lambda: dataclasses.replace(DIT, steps=0), "steps must be at least 1, got 0"),
        (lambda: dataclasses.replace(DIT, lr=1e-4, lr_end=1e-3), "0 <= lr_end <= lr"),
        (
            lambda: StageConfig("s", DitObjective(), ("*",), 100),
            r"stage s: the objective dit takes batches of Captioned, its data \(images\) gives Images",
        ),
    ],
)
def test_sizes_that_contradict_each_other_are_refused(build, message):
    with pytest.raises(InputError, match=message):
        build()


@pytest.mark.parametrize(
    "build",
    [
        lambda: RouterConfig(count=0),
        lambda: RouterConfig(temperature=0.0),
        lambda: RouterConfig(kind="last", temperature=2.0),
        lambda: ConnectorConfig(layers=-1),
        lambda: AutoencoderConfig(encoder_layers=(1, 1)),
        lambda: AutoencoderConfig(encoder_layers=(1, 0, 1, 1)),
        lambda: AutoencoderConfig(latent_channels=5),
        lambda: SparConfig(text=dataclasses.replace(TEXT, heads=3)),
        lambda: SparConfig(text=dataclasses.replace(TEXT, kv_heads=2)),
        lambda: SparConfig(text=dataclasses.replace(TEXT, image_token_id=128)),
        lambda: SparConfig(vision=VisionConfig(hidden_size=128, heads=3)),
        lambda: SparConfig(vision=VisionConfig(patch_size=0)),
    ],
)
def test_sizes_that_no_network_can_have_are_refused(build):
    with pytest.raises(InputError):
        build()


@pytest.mark.parametrize(
    "build",
    [
        lambda: RouterConfig(temperature=float("nan")),
        lambda: TextConfig(hidden_size=160, heads=32, kv_heads=32),  # rotary positions want an even head
        lambda: TextConfig(rope_theta=0.0),
        lambda: StreamConfig(pixel_layers=-1),
        lambda: StreamConfig(residual_blocks=-3),
        lambda: StreamConfig(mlp_ratio=0),
        lambda: StreamConfig(pixel_heads=0) and SparConfig(streams=StreamConfig(pixel_heads=0)),
        lambda: AutoencoderConfig(encoder_blocks=("ResBlock", "ResBlock", "ResBlock", "Mamba")),
        lambda: AutoencoderConfig(channels=(16, 16, 24, 16)),  # the shortcuts want dividing counts at every step
        lambda: DenoiserConfig(heads=0),
        lambda: DenoiserConfig(heads=1, head_dim=9),
        lambda: DenoiserConfig(cross_heads=0),
        lambda: DenoiserConfig(mlp_ratio=-1.0),
        lambda: DenoiserConfig(interpolation_scale=0.0),
        lambda: DenoiserConfig(position_gain=-1.0),
        lambda: DenoiserConfig(caption_channels=30),  # four waves a channel group in the reference positions
    ],
)
def test_sizes_that_no_network_can_have_are_refused_everywhere(build):
    with pytest.raises(InputError):
        build()


@pytest.mark.parametrize("name", ["shapes", "tiny"])
def test_the_streams_of_a_recipe_meet_its_autoencoder_on_one_grid(name):
    model = recipe(name).model
    assert model.autoencoder.stride == model.token_stride  # the shapes world needs no resize between the two
    assert model.grid * model.token_stride == model.image_size
