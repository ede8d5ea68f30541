"""What the user can mend is a UserError: what is wrong, where, how to mend it.

Both texts are templates with `{placeholders}`; the values travel beside them, so that the same message can be shown in
another language (the template is the key of the translation) and so that a value never ends up inside a translated text.
"""

from __future__ import annotations

import errno

#: errno of a disk, or of this user's share of it, that is full; EFBIG: a limit on file size (FAT, ulimit).
FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC), errno.EFBIG)

#: Exit codes of the command line (docs/cli.md): a failed run, wrong use or config, an unfit environment, stopped and saved.
EXIT_FAILED, EXIT_USE, EXIT_ENVIRONMENT, EXIT_STOPPED = 1, 2, 3, 130


class Stopped(Exception):
    """The user asked to stop while nothing is being learned yet (scanning, caching): nothing to save."""


class UserError(Exception):
    """A mistake or a lack that the user can mend.

    what:   literal template, e.g. "{path} holds no pictures"
    where:  file, folder or config key (with its line or value) that the message is about; may be empty
    mend:   literal template of what to do; may be empty only when `what` says it already
    code:   exit code of the command line, one of the constants above
    values: what the placeholders of both templates stand for
    """

    def __init__(
        self, what: str, *, where: str = "", mend: str = "", code: int = EXIT_USE, **values: object
    ) -> None:
        self.what_template, self.mend_template, self.where, self.code, self.values = (
            what,
            mend,
            where,
            code,
            values,
        )
        super().__init__(self.render(what, mend))

    @property
    def what(self) -> str:
        return self.what_template.format(**self.values)

    @property
    def mend(self) -> str:
        return self.mend_template.format(**self.values)

    def render(self, what: str, mend: str) -> str:
        """The whole message from two templates (the originals or their translations)."""
        text = what.format(**self.values)
        if self.where:
            text = f"{self.where}: {text}"
        return f"{text}\n  -> {mend.format(**self.values)}" if mend else text


def require_text(text: str, where: str) -> str:
    """The text. Raises UserError for what a terminal of another encoding leaves in arguments: no file could hold it."""
    if any("\ud800" <= char <= "\udfff" for char in text):
        raise UserError(
            "there are characters in it that are no text",
            where=where,
            mend="type it again; the terminal has to be set to UTF-8",
        )
    return text


def out_of_memory(error: BaseException, where: str) -> UserError | None:
    """What to say when the memory of the card or of the machine ran out; None for every other fault.

    Told by class and text alone: torch, whose errors these are, need not be loaded.
    """
    reason = (str(error).splitlines() or [""])[0][:160]
    if type(error).__name__ == "OutOfMemoryError":
        return UserError(
            "the card ran out of memory ({reason})",
            where=where,
            mend="close what else uses the card, or ask for less: data.resolution, data.batch_size, memory.vram_gb, --size; "
            "what is saved stays",
            code=EXIT_FAILED,
            reason=reason,
        )
    if isinstance(error, MemoryError) or "can't allocate memory" in reason:
        return UserError(
            "the machine ran out of memory ({reason})",
            where=where,
            mend="close other programs, or ask for less: data.resolution, data.batch_size, --size; what is saved stays",
            code=EXIT_FAILED,
            reason=reason or "MemoryError",
        )
    return None


def cannot_write(error: OSError, where: str) -> UserError:
    """What to say when something of a run's folder cannot be written."""
    return UserError(
        "the run cannot be written ({reason}); what was saved before is intact",
        where=str(error.filename or where),
        mend="make room or mend the folder's rights, then go on with --resume latest",
        code=EXIT_FAILED,
        reason=error.strerror or error,
    )


class UserErrors(UserError):
    """Several mistakes found in one look, told together so that they are mended together."""

    def __init__(self, errors: list[UserError], code: int = EXIT_USE) -> None:
        assert errors, "an empty list of errors is not an error"
        self.errors = errors
        text = "\n".join(str(error) for error in errors)
        super().__init__("{text}", code=max([code, *(error.code for error in errors)]), text=text)
