"""Run under torchrun: each rank trains in its own workspace, and writes how its command ended.

Arguments: one workspace a rank. Twice: as they are, then all in the first.
"""

import json
import os
import sys
from pathlib import Path

from ringmo.cli import main

rank, workspaces = int(os.environ["RANK"]), sys.argv[1:]
codes = [main(["pretrain", "--workspace", where]) for where in (workspaces[rank], workspaces[0])]
Path(workspaces[rank], "codes.json").write_text(json.dumps(codes))
