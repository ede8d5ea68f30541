"""The disk is full at one chosen write of a run. What must be true then, and after there is room again."""

from __future__ import annotations

from dataclasses import dataclass

from disk import Disk, Write, on
from ground import Facts, Ground, left_overs, say, steps_of, whole_checkpoints

#: A run that writes everything there is to write, in four steps.
EVERYTHING = {
    "save.every": 2,
    "save.keep": 1,
    "validation.every": 2,
    "preview.every": 4,
    "preview.prompts": [{"text": "a", "steps": 1}],
    "log.tensorboard": True,
}


@dataclass(frozen=True)
class Found:
    """One injected write: what the run answered, and what is wrong with that ("": nothing)."""

    write: Write
    stays: bool
    code: int
    message: str
    wrong: str


def writes_of(ground: Ground, name: str = "counted") -> list[Write]:
    """Every write of the run, in order. Names of runs are letters: what has digits is taken for a number of a process."""
    disk = Disk([ground.folder / "out", ground.folder / f"cache {name}", ground.folder / "state"])
    with on(disk):
        said = say("train", ground.config(name))
    assert said.code == 0, said.text
    ground.forget(name)
    return [Write(one.call, one.file.replace(name, "NAME"), one.number) for one in disk.seen]


def attack(ground: Ground, whole: Facts, write: Write, stays: bool, name: str) -> Found:
    """Fills the disk at this write, looks at what is left, makes room, goes on, and compares with the run left alone."""
    at = Write(write.call, write.file.replace("NAME", name), write.number)
    disk = Disk([ground.folder / "out", ground.folder / f"cache {name}", ground.folder / "state"], at, stays)
    config, run = ground.config(name), ground.run(name)
    with on(disk):
        said = say("train", config)
    wrong = []
    if not disk.hit:
        wrong.append("the write did not come")
    if said.code not in (0, 1, 3):
        wrong.append(f"exit code {said.code}")
    if said.code == 3 and "cannot be written" not in said.text and steps_of(run):
        wrong.append("exit code 3 for a run that had learned")
    if said.code and not ("\n  -> " in said.text and "error: " in said.text):
        wrong.append("no message with a mend")
    if "Traceback" in said.text:
        wrong.append("a traceback")
    if said.code and not any(word in said.text for word in ("No space left", "disk")):
        wrong.append("the message does not speak of the disk")
    saved = whole_checkpoints(run)
    reached = max(steps_of(run), default=0)
    if reached > 2 and not saved:
        wrong.append("nothing is saved")
    again = say("train", config, "--resume", "latest")
    if again.code:
        wrong.append(f"cannot go on: {again.text[-300:]}")
    else:
        if ground.facts(name) != whole:
            wrong.append("another result")
        wrong += [f"left over: {one}" for one in left_overs(run)]
    message = said.text.partition("error: ")[2].strip().replace(str(ground.folder), "...")
    ground.forget(name)
    return Found(write, stays, said.code, message, "; ".join(wrong))
