"""Where in the data a run is: a count of samples, which means the same for any number of ranks or workers."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError

from loglinear.errors import UserError

NAMES = {
    "seed": "data.seed",
    "seq_len": "model.seq_len",
    "shuffle_window": "data.shuffle_window",
    "contiguous": "data.contiguous",
    "best_fit": "data.best_fit",
    "tokenizer_sha256": "the tokenizer's SHA-256",
    "mixture": "the mixture so far (a fingerprint of data.sources, their names, sizes and data.curriculum)",
}


class DataState(BaseModel):
    """`samples` were consumed by all ranks together since the first step; the rest fixes their order.

    `mixture` tells of those samples alone (see `SampleStream.fingerprint`), so that what comes later may change.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[2] = 2
    samples: NonNegativeInt
    seed: int
    seq_len: int
    shuffle_window: int
    contiguous: int
    best_fit: int | None
    tokenizer_sha256: str
    mixture: str

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> Self:
        """The state that `to_dict` gave.

        Raises:
            UserError: `saved` is something else.
        """
        try:
            return cls.model_validate(saved)
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(str(part) for part in problem["loc"])
            raise UserError(f"the checkpoint's data state is unreadable ({where}: {problem['msg']})") from None

    def to_dict(self) -> dict[str, Any]:
        """The state as what JSON can hold."""
        return self.model_dump(mode="json")

    def require_same_order(self, other: DataState) -> None:
        """Check that `self`, from a checkpoint, counts the very samples that `other`, of this run, does.

        Raises:
            UserError: a setting that the order depends on has changed.
        """
        for field, name in NAMES.items():
            saved, present = getattr(self, field), getattr(other, field)
            if saved != present:
                raise UserError(
                    f"the checkpoint was trained with {name} = {saved}, this run has {present},"
                    " so its place in the data would mean nothing; restore that setting, or start a new run"
                )
