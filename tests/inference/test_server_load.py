"""Two minutes of load: no request fails, and the server's memory stays what it is."""

import random
import threading
import time
from collections import Counter
from pathlib import Path
from statistics import median

import httpx
import psutil
import pytest
from served import Served, png, tiff, write_task_model
from small_models import rgb

from ringmo.workspace import init

pytestmark = pytest.mark.slow

KINDS = ("scene", "segmentation", "detection")
CLIENTS, PAUSE_S, SECONDS, SETTLED_S = 8, 0.2, 120, 40
GROWTH_MB = 80.0  # one batch of these models takes some 50


def test_two_minutes_of_load_leave_memory_as_it_was(tmp_path: Path) -> None:
    workspace = init(tmp_path / "workspace")
    models = [str(write_task_model(workspace.root / kind, kind)) for kind in KINDS]
    served = Served(workspace, *(word for model in models for word in ("--model", model)))
    process = psutil.Process(served.process.pid)
    images = [(png if i % 2 else tiff)(rgb(i, 40 + i, 50 + i)) for i in range(30)]
    told: Counter[str] = Counter()
    ends = time.monotonic() + SECONDS

    def client(seed: int) -> None:
        dice = random.Random(seed)
        with httpx.Client(timeout=60) as connection:
            while time.monotonic() < ends:
                path = dice.choice(["/predict", *(f"/predict/{kind}" for kind in KINDS)])
                try:
                    answer = connection.post(served.url + path, content=dice.choice(images))
                    told[str(answer.status_code)] += 1
                except httpx.HTTPError as error:
                    told[repr(error)] += 1
                time.sleep(dice.expovariate(1 / PAUSE_S))

    clients = [threading.Thread(target=client, args=(seed,)) for seed in range(CLIENTS)]
    for one in clients:
        one.start()
    measured: list[float] = []
    while time.monotonic() < ends:
        time.sleep(1)
        if time.monotonic() > ends - SECONDS + SETTLED_S:
            measured.append(process.memory_info().rss / 1e6)
    for one in clients:
        one.join()
    files = process.num_fds()
    assert set(told) == {"200"} and told["200"] > 10 * CLIENTS, told
    third = len(measured) // 3
    # What is usual: a busy machine has larger batches now and then, and their memory stays.
    growth = median(measured[-third:]) - median(measured[:third])
    assert growth < GROWTH_MB, [round(mb) for mb in measured]
    assert files < 100
    assert served.stop() == 0, served.log
