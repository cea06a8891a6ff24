"""A training on two machines, as deploy/kubernetes/pretrain starts it: here two processes."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from made_store import make_selections, make_store
from ruamel.yaml import YAML
from servers import free_port
from test_ranks import losses
from tiny import TINY

from ringmo import config
from ringmo.cli import main
from ringmo.workspace import init

MANIFEST = Path(__file__).parents[2] / "deploy" / "kubernetes" / "pretrain" / "pretrain.yaml"


@pytest.mark.slow
def test_two_machines_give_the_curve_of_one(tmp_path: Path) -> None:
    """With the job's own variables; its addresses replaced."""
    _, job = YAML(typ="safe").load_all(MANIFEST)
    said = job["spec"]["template"]["spec"]["containers"][0]["env"]
    env = {one["name"]: one.get("value") for one in said}
    assert env["PET_NODE_RANK"] is None, "Kubernetes gives it"
    assert job["spec"]["completions"] == int(env["PET_NNODES"] or 0) == 2
    env |= {"PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": str(free_port())}
    places = {}
    for name in ("one", "two"):
        places[name] = init(tmp_path / name)
        config.edit(places[name].params_file, {**TINY, "hardware.accelerator": "cpu"})
        make_selections(places[name], make_store(places[name]))
    nodes = [
        subprocess.Popen(
            [sys.executable, "-m", "ringmo", "pretrain", "--workspace", str(places["two"].root)],
            env=os.environ | env | {"PET_NODE_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [node.communicate(timeout=240)[1] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], said
    assert main(["pretrain", "--workspace", str(places["one"].root)]) == 0
    for name in ("train/loss", "val/loss"):
        single, double = losses(places["one"], name), losses(places["two"], name)
        assert len(single) > 1
        np.testing.assert_allclose(double, single, rtol=1e-4)
    assert (places["two"].work("pretrain") / "encoder" / "model.json").is_file()
