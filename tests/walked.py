"""A scene answered in a process of its own: `python walked.py SCENE OUT SECONDS SIDE [GO]`.

SECONDS: what each batch of windows takes beside. SIDE: of blocks, pixels. GO: a file that it waits
for, once it is ready, and says so by one beside it. Prints what it did and what memory it took, as
JSON.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from pixelwise import Pixelwise, bundle_of

from ringmo.inference import block_answers, scenes
from ringmo.system_metrics import peak_memory_mb


class Slow(Pixelwise):
    seconds = 0.0

    def forward(self, images: Any) -> Any:
        time.sleep(self.seconds)
        return super().forward(images)


def main(scene: str, out: str, seconds: str, side: str, go: str = "") -> None:
    torch.set_num_threads(1)
    torch.manual_seed(7)
    block_answers.LARGEST = int(side)
    model = Slow(3, size=128)
    model.seconds = float(seconds)
    bundle = bundle_of(model=model, size=128)
    before = psutil.Process().memory_info().rss / 1e6
    about = scenes.about(bundle, "segmentation/7")
    job = scenes.SceneJob(bundle, about, {"rgb": Path(scene)}, Path(out), "s")
    if go:
        Path(f"{go}.{os.getpid()}").touch()
        while not Path(go).exists():
            time.sleep(0.02)
    answer = None
    while answer is None:
        job.work()
        answer = job.deliver()
        time.sleep(0.05)
    told = {"windows": job.times.windows, "pixels": job.times.pixels}
    print(json.dumps(told | {"before_mb": before, "peak_mb": peak_memory_mb()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
