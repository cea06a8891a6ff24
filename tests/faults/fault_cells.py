"""`make faults`: fill the table of fault × stage × outcome, cell by cell, and write it.

    python -m fault_cells [--faults "kill mlflow" …] [--stages pretrain …] [--alone] [--share 1/3]

One chain takes as many cells as it can, a fault at each of its stages; `--alone` gives each cell a
chain of its own. Several may run side by side, each with its share of the chains. Cells that were
filled with this very code are not filled again; those that went well with no code come first.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import platform
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fault_rig import Rig
from fault_run import CLOCKS, FAULTS, FULL, KILLS, PAUSES, STAGES, Cell, Run

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).with_name("cells.jsonl")
PAGE = ROOT / "docs" / "faults.md"
BEGIN, END = "<!-- the table: written by `make faults` -->", "<!-- end of the table -->"
Plan = list[tuple[str, str]]  # faults and their stages, in the stages' order
# Once in a chain: a run is begun again twice at most.
ENDS_RUN = ("kill flow", "kill machine", "pause flow")
# After two such pauses with a moment between them the flow counts as dead.
SILENT = ("pause flow", "pause prefect", "pause postgres")


def code() -> str:
    """Hash of what is tested."""
    found = hashlib.sha256()
    for folder in ("ringmo", "flows"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            found.update(path.read_bytes())
    return found.hexdigest()[:12]


def filled() -> list[dict[str, Any]]:
    if not RESULTS.exists():
        return []
    return [json.loads(line) for line in RESULTS.read_text().splitlines()]


def filled_now() -> set[tuple[str, str]]:
    """Those that were filled with this very code."""
    now = code()
    return {(row["fault"], row["stage"]) for row in filled() if row["code"] == now}


def to_fill(plan: Plan) -> Plan:
    """What of it is left; another of those side by side may have filled some."""
    done = filled_now()
    return [cell for cell in plan if cell not in done]


def keep(cell: Cell, resumed: list[str]) -> None:
    row = dataclasses.asdict(cell) | {
        "code": code(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{os.cpu_count()} cores, {platform.system()} {platform.release()}",
        "resumed": resumed,
    }
    with RESULTS.open("a") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
    print(f"{cell.fault} × {cell.stage}: {cell.outcome} {cell.seconds} s {cell.wrong}", flush=True)


def reference(rig: Rig, folder: Path) -> dict[str, Any]:
    """What an undisturbed run makes; known once for each code."""
    file = Path(tempfile.gettempdir()) / f"ringmo-faults-{code()}.json"
    if file.exists():
        known: dict[str, Any] = json.loads(file.read_text())
        return known
    run = Run(rig, folder / "undisturbed", "undisturbed")
    run.begin()
    state = run.wait()
    assert state["type"] == "COMPLETED", state
    found = run.facts()
    wrong = run.wrong(found)
    assert not wrong, wrong
    file.write_text(json.dumps(found))
    return found


def chain(rig: Rig, folder: Path, plan: Plan, expected: Any) -> Plan:
    """One run, disturbed at each of the stages; returns those that it did not get to."""
    name = f"{plan[0][0]}-{time.time():.0f}".replace(" ", "-")
    full = any(fault == FULL for fault, _ in plan)
    rig.forget_models()
    run = Run(rig, folder / name, name, small=200 if full else 0)
    run.begin()
    cells: list[Cell] = []
    left = list(plan)
    lost = ""
    while left and not lost:
        fault, stage = left.pop(0)
        try:
            cells.append(run.disturb(fault, stage))
            print(f"  {fault}: {stage}: {cells[-1].outcome} {cells[-1].seconds} s", flush=True)
        except (RuntimeError, TimeoutError) as error:
            lost = str(error)
            if not cells:  # nothing was disturbed before: it is this cell's
                cells.append(Cell(fault, stage, "lost", wrong=[lost]))
                continue
            left = [(fault, stage), *left]  # another chain's then
            if run.state()["type"] != "COMPLETED":  # else it went on past it under a paused server
                cells[-1].wrong.append(lost)
    try:
        run.wait()
        wrong = run.wrong(expected)
    except TimeoutError as error:
        wrong = [str(error)]
    for cell in cells:
        cell.wrong += [what for what in wrong if what not in cell.wrong]
        keep(cell, run.resumed())
    run.remove()
    return left


def chains(todo: dict[str, list[str]], alone: bool) -> list[Plan]:
    """Faults that each stage is to meet, as chains that take one at each stage, of all kinds."""
    stages = [stage for stage in STAGES if todo.get(stage)]
    if alone:
        return [[(fault, stage)] for stage in stages for fault in todo[stage]]
    left = {}
    for i, stage in enumerate(stages):  # each chain begins with another fault
        turn = i % len(todo[stage])
        left[stage] = todo[stage][turn:] + todo[stage][:turn]
    found: list[Plan] = []
    while any(left.values()):
        plan: Plan = []
        for stage in stages:
            not_now = {fault for fault, _ in plan if fault in ENDS_RUN}
            if plan and plan[-1][0] in SILENT:
                not_now |= {*SILENT}
            fault = next((f for f in left[stage] if f not in not_now), None)
            if fault is not None:
                left[stage].remove(fault)
                plan.append((fault, stage))
        found.append(plan)
    return found


def write() -> None:
    """The table into docs/faults.md."""
    newest = {(row["fault"], row["stage"]): row for row in filled()}
    lines = [f"| | {' | '.join(STAGES)} |", "|---" * (len(STAGES) + 1) + "|"]
    short = {
        "went on": "on",
        "the stage was tried again": "stage",
        "the run was begun again": "run",
        "the run ended, the next went on": "next",
    }
    for fault in FAULTS:
        row = []
        for stage in STAGES:
            cell = newest.get((fault, stage))
            if cell is None:
                row.append("")
            else:
                said = short.get(cell["outcome"], cell["outcome"])
                mark = "**✗** " if cell["wrong"] else ""
                row.append(f"{mark}{said} {cell['seconds']:.0f} s")
        lines.append(f"| {fault} | {' | '.join(row)} |")
    good = [cell for cell in newest.values() if not cell["wrong"]]
    last = max(newest.values(), key=lambda cell: cell["time"])["code"]
    same = sum(cell["code"] == last for cell in newest.values())
    days = sorted({cell["time"][:10] for cell in newest.values()})
    machines = sorted({cell["machine"] for cell in newest.values()})
    total = len(FAULTS) * len(STAGES)
    about = (
        f"{len(newest)} of {total} cells are filled, {len(good)} of them with nothing wrong; "
        f"{same} by the newest code that was tried"
        f"{'' if last == code() else ', which has changed since'}. "
        f"{', '.join(days)}; {'; '.join(machines)}."
    )
    wrong = [
        f"- {cell['fault']}, {cell['stage']}: {'; '.join(cell['wrong'])[:300]}"
        for cell in newest.values()
        if cell["wrong"]
    ]
    text = "\n".join([BEGIN, "", about, "", *lines, "", *wrong, *[""] * bool(wrong), END])
    page = PAGE.read_text()
    before, _, rest = page.partition(BEGIN)
    PAGE.write_text(before + text + rest.partition(END)[2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=list(FAULTS))
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--alone", action="store_true", help="a chain for each cell")
    parser.add_argument("--share", metavar="K/N", default="1/1", help="of the chains, each N-th")
    parser.add_argument("--table", action="store_true", help="only write the table")
    asked = parser.parse_args()
    done = filled_now()
    good = done | {(row["fault"], row["stage"]) for row in filled() if not row["wrong"]}
    share, _, shares = asked.share.partition("/")
    plans: list[Plan] = []
    if not asked.table:
        faults = [fault for fault in FAULTS if fault in asked.faults]
        asked_for = {(fault, stage) for fault in faults for stage in asked.stages}
        # First what went well by no code yet.
        for cells in (asked_for - good, asked_for & (good - done)):
            for kind in (KILLS + PAUSES, (FULL,), tuple(CLOCKS)):
                todo = {s: [f for f in faults if f in kind and (f, s) in cells] for s in STAGES}
                plans += chains(todo, asked.alone)
    plans = plans[int(share) - 1 :: int(shares)]
    folder = Path(tempfile.mkdtemp(prefix="ringmo-faults-"))
    print(f"logs and workspaces: {folder}", flush=True)
    for false_clock in (False, True):
        some = [p for p in plans if p and any(f in CLOCKS for f, _ in p) == false_clock]
        if some:
            fill(folder / ("clock" if false_clock else "clear"), some, false_clock)
    write()


def fill(folder: Path, plans: list[Plan], false_clock: bool) -> None:
    rig = Rig(folder / "rig", false_clock)
    try:
        rig.start()
        expected = reference(rig, folder)
        for plan in plans:
            while plan := to_fill(plan):
                plan = chain(rig, folder, plan, expected)
                write()
    finally:
        rig.stop()


if __name__ == "__main__":
    main()
