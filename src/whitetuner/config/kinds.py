"""Which kind of data set a task learns from: edit from targets with given pictures, t2i from pictures, i2v and t2v from videos
(t2v from pictures too: clips of one frame)."""

from __future__ import annotations

from whitetuner.config.data_section import DataSet
from whitetuner.config.schema import Config
from whitetuner.errors import UserError, UserErrors


def refuse_wrong_data(config: Config) -> None:
    """Raises UserError(s) for every set that the task cannot learn from, saying what it needs. Reads no folder.

    That there is no set at all is told by `Config.data_sets`.
    """
    errors = []
    if config.data.source is None and not config.data.sets:
        return
    several = len(config.data.sets) > 1
    for index, one in enumerate(config.data_sets()):
        error = _wrong(config.model.task, one, f"data.sets[{index}]" if several else "data")
        if error is not None:
            errors.append(error)
    if errors:
        raise UserErrors(errors) if len(errors) > 1 else errors[0]


def _wrong(task: str, one: DataSet, where: str) -> UserError | None:
    if task == "edit" and one.target is None:
        return UserError(
            "an edit task learns from targets and given pictures, but this set has none",
            where=where,
            mend='set target = "FOLDER" and conditions = ["FOLDER"] there, or model.task = "t2i"',
        )
    if one.target is not None and not one.conditions:
        return UserError(
            "the set has targets, but no given pictures",
            where=f"{where}.conditions",
            mend='set conditions = ["FOLDER"] (pictures named like their targets), or images = "FOLDER" for text to image',
        )
    if one.mask_dir is not None and one.mask_alpha:
        return UserError(
            "mask_dir and mask_alpha are two masks for one picture",
            where=f"{where}.mask_alpha",
            mend="take one of the two out",
        )
    if one.videos is not None and (one.mask_dir is not None or one.mask_alpha):
        return UserError(
            "masks are for pictures, but this set has videos",
            where=f"{where}.{'mask_dir' if one.mask_dir is not None else 'mask_alpha'}",
            mend="take the mask out of this set, or write it in those of [[data.sets]] that have pictures",
        )
    if task == "i2v" and one.videos is None:
        return UserError(
            "an i2v task learns how a first frame goes on, but this set has no videos",
            where=where,
            mend='set videos = "FOLDER" there (video files, folders of frames)',
        )
    if task not in ("i2v", "t2v") and one.videos is not None:
        return UserError(
            "videos are for a video task, but the task is {task}",
            where=f"{where}.videos",
            mend='set model.task = "i2v" or "t2v" with a video model, or name pictures with images = "FOLDER"',
            task=task,
        )
    if task != "edit" and (one.target is not None or one.conditions):
        return UserError(
            "targets and given pictures are for an edit task, but the task is {task}",
            where=where,
            mend='set model.task = "edit", or name the pictures with images = "FOLDER"',
            task=task,
        )
    return None
