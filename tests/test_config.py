"""params.yaml: what is wrong is said in one line, and nothing is written when it is."""

import copy
from pathlib import Path
from typing import Any

import pytest

from ringmo import config
from ringmo.config import Config
from ringmo.errors import BadInput
from ringmo.workspace import Workspace, init, template


@pytest.fixture(scope="module")
def values() -> Any:
    return config.read_yaml(template("params.yaml"))


def test_the_shipped_parameters_are_valid(values: Any) -> None:
    assert Config.check(values, "params.yaml").tasks == ["scene"]


@pytest.mark.parametrize("recipe", sorted(template("recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_recipe_fits_the_parameters(recipe: Path, tmp_path: Path) -> None:
    made = init(tmp_path / "w")
    config.edit(made.params_file, config.recipe(recipe))


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("pretrain.epoch", 3, "pretrain.epoch: no such key; did you mean `epochs`?"),
        ("finetune.scene.mixupp", 1, "did you mean `mixup`?"),
        ("selct", {}, "did you mean `select`?"),
        ("pretrain.mask_ratio", 1.5, "pretrain.mask_ratio: Input should be less than or equal"),
        ("pretrain.epochs", 0, "pretrain.epochs"),
        ("pretrain.epochs", "many", "pretrain.epochs"),
        ("model.image_size", 65, "image_size must be a multiple of"),
        ("pretrain.mask_patch_size", 7, "mask_patch_size"),
        ("select.sensor", "radar", "`radar` is not among sensors"),
        ("sensors.s1.dtype", "float64", "sensors.s1.dtype: Input should be 'uint8', 'uint16',"),
        ("sensors.s1.mean", [1.0], "mean and std need one value for each band"),
        ("sensors.landsat.clip", None, "sensors.landsat: mean and std are null, so that pixels"),
        ("sensors.s1.std", None, "sensors.s1: mean and std are both given, or both null"),
        ("sensors.s1.decibel", True, "sensors.s1.decibel: no such key; did you mean `decibels`?"),
        ("ingest.about", {"/a": {"sensor": "radar"}}, "ingest.about: /a: `radar` is not among"),
        ("split.test", 0.95, "leave less than a tenth"),
        ("ingest.sources", [], "ingest.sources"),
        ("pretrain.method", "mae", "pretrain.method: mae drops tokens, which needs model.backbone"),
        ("pretrain.init", "swin.safetensors", "pretrain.init: weights of timm need its stem"),
        ("pretrain.mix", {"rgb": 1, "radar": 1}, "pretrain.mix: `radar` is not among sensors"),
        ("pretrain.mix", {"s1": 1}, "the tasks' sensor `rgb` (select.sensor) is missing"),
        ("pretrain.mix", {"rgb": 0}, "pretrain.mix.rgb: Input should be greater than 0"),
        ("pretrain.accumulate", 7, "7 micro-batches do not divide batch_size (64)"),
        ("finetune.scene.image_size", 40, "finetune: {'image_size': 40}: image_size must be a mul"),
        ("hardware", {"accelerator": "cpu", "precision": "bf16"}, "a CPU computes in 32 bits"),
        ("hardware", {"acelerator": "cpu"}, "did you mean `accelerator`?"),
        ("hardware.devices", 0, "hardware.devices"),
        ("card", {"contcat": "me"}, "card.contcat: no such key; did you mean `contact`?"),
        ("card", {"price_per_hour": -1}, "card.price_per_hour: Input should be greater than"),
        ("ingest.about", {"/a": {"license": "MIT"}}, "did you mean `licence`?"),
        ("schema", 9, "this version reads 1, found 9"),
        ("services.mlflow_port", 70000, "services.mlflow_port"),
    ],
)
def test_a_wrong_value_is_named_in_one_line(values: Any, key: str, value: Any, said: str) -> None:
    changed = copy.deepcopy(values)
    place = changed
    *parents, last = key.split(".")
    for parent in parents:
        place = place[parent]
    place[last] = value
    with pytest.raises(BadInput) as refused:
        Config.check(changed, "params.yaml")
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)
    assert refused.value.exit_code == 2


def test_editing_keeps_every_comment(workspace: Workspace) -> None:
    before = workspace.params_file.read_text()
    config.edit(workspace.params_file, {"pretrain.epochs": 33, "ingest.sources": ["/a b/ç"]})
    after = workspace.params_file.read_text()
    assert Config.load(workspace.params_file).pretrain.epochs == 33
    assert [line.split("#")[1:] for line in before.splitlines()] == [
        line.split("#")[1:] for line in after.splitlines()
    ]


def test_a_refused_edit_leaves_the_file_alone(workspace: Workspace) -> None:
    before = workspace.params_file.read_bytes()
    for changes in ({"pretrain.epochs": 3, "pretrain.mask_ratio": 7}, {"nowhere.x": 1}):
        with pytest.raises(BadInput):
            config.edit(workspace.params_file, changes)
        assert workspace.params_file.read_bytes() == before


def test_what_is_not_yaml_is_named_with_its_line(tmp_path: Path) -> None:
    broken = tmp_path / "params.yaml"
    broken.write_text("schema: 1\ntasks: [scene\nmodel: {}\n")
    with pytest.raises(BadInput, match=r"params.yaml, line \d: not YAML"):
        config.read_yaml(broken)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"a: \x00\n", "not YAML: unacceptable character"),
        (b"\x80\x81", "not YAML: unacceptable character"),
        (b"- " * 100_000, "nested over 100 times"),
        (b"[" * 100_000, "nested over 100 times"),
    ],
)
def test_what_no_reader_gets_through_is_one_line(tmp_path: Path, data: bytes, said: str) -> None:
    """A reader that follows every nesting dies of it, and takes the process with it."""
    broken = tmp_path / "params.yaml"
    broken.write_bytes(data)
    with pytest.raises(BadInput, match=said) as error:
        config.read_yaml(broken)
    assert "\n" not in str(error.value)


def test_a_value_that_nests_without_end_is_no_value() -> None:
    with pytest.raises(BadInput, match="the value is not YAML"):
        config.parse_assignment("run.retries=" + "[" * 100_000)
    assert config.parse_assignment("a.b=[s3://bucket/x]") == ("a.b", ["s3://bucket/x"])


def test_a_digest_tells_values_apart_and_nothing_else() -> None:
    one = config.digest({"a": 1, "b": [1, 2]}, "x")
    assert one == config.digest({"b": [1, 2], "a": 1}, "x")
    assert one != config.digest({"a": 1, "b": [2, 1]}, "x")


def test_a_workspace_is_made_once_and_found_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = init(tmp_path / "w")
    with pytest.raises(BadInput, match="is a workspace already"):
        init(tmp_path / "w")
    monkeypatch.setenv("RINGMO_WORKSPACE", str(made.root))
    assert Workspace.find().root == made.root
    with pytest.raises(BadInput, match="is no workspace"):
        Workspace.find(tmp_path)


def test_an_address_in_a_list_is_written_as_dvc_reads_it(workspace: Any) -> None:
    """Bare, DVC's reader takes it for an error, and no run ever gets beyond its ingest."""
    from ruamel.yaml import YAML

    config.edit(workspace.params_file, {"ingest.sources": ["s3://bucket/new"]})
    assert YAML(typ="safe").load(workspace.params_file)["ingest"]["sources"] == ["s3://bucket/new"]
    text = workspace.params_file.read_text()
    workspace.params_file.write_text(text.replace('["s3://bucket/new"]', "[s3://bucket/new]"))
    with pytest.raises(BadInput, match="put quotes around") as error:
        Config.load(workspace.params_file)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "key, value",
    [
        ("ingest.endpoint", "http://key:hunter2@host"),
        ("ingest.sources", ["s3://key:hunter2@bucket/x"]),
        ("ingest.dask", "tcp://me:hunter2@host:8786"),
        ("promotion.webhook", "https://me:hunter2@host/"),
        ("versioning.remote", "ssh://me:hunter2@host/x"),
    ],
)
def test_passwords_in_addresses_are_refused_and_not_repeated(
    workspace: Any, key: str, value: Any
) -> None:
    before = workspace.params_file.read_text()
    with pytest.raises(BadInput, match=r"no password in params\.yaml") as error:
        config.edit(workspace.params_file, {key: value})
    assert key in str(error.value) and "hunter2" not in str(error.value)
    assert workspace.params_file.read_text() == before


def test_passwords_leave_the_servers_addresses() -> None:
    from ringmo.environment import part_passwords, shown

    env = {
        "MLFLOW_TRACKING_URI": "https://ada:hunt%40er2@mlflow.example:5000/x",
        "PREFECT_API_URL": "http://admin:hunter3@127.0.0.1:4200/api",
    }
    part_passwords(env)
    assert env == {
        "MLFLOW_TRACKING_URI": "https://mlflow.example:5000/x",
        "MLFLOW_TRACKING_USERNAME": "ada",
        "MLFLOW_TRACKING_PASSWORD": "hunt@er2",
        "PREFECT_API_URL": "http://127.0.0.1:4200/api",
        "PREFECT_API_AUTH_STRING": "admin:hunter3",
    }
    part_passwords(env)
    assert env["MLFLOW_TRACKING_PASSWORD"] == "hunt@er2"
    database = {"MLFLOW_TRACKING_URI": "postgresql://ada:hunter2@host/mlflow"}
    part_passwords(database)
    assert database["MLFLOW_TRACKING_URI"].count("hunter2") == 1
    assert shown(database["MLFLOW_TRACKING_URI"]) == "postgresql://host/mlflow"
    with pytest.raises(BadInput, match="AWS_ENDPOINT_URL: no password") as error:
        part_passwords({"AWS_ENDPOINT_URL": "http://key:hunter2@host"})
    assert "hunter2" not in str(error.value)
