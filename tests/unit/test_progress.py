"""The progress bar stands around collective calls: whatever standard error is, it never fails them."""

import io
import sys
from pathlib import Path

import pytest
import torch

from distckpt import Checkpoint, progress


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class _HungUp(_Terminal):
    def write(self, text: str) -> int:
        raise OSError(5, "Input/output error")


class _HangsUpLater(_Terminal):
    """Fails once something was shown."""

    def write(self, text: str) -> int:
        if self.getvalue():
            raise OSError(5, "Input/output error")
        return super().write(text)


class _ToALog:
    """What programs replace standard error with often has no more than this."""

    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None:
        pass


def _closed() -> io.StringIO:
    stream = io.StringIO()
    stream.close()
    return stream


@pytest.mark.parametrize("stream", [None, _ToALog(), _closed(), _HungUp()], ids=lambda stream: type(stream).__name__)
def test_a_restore_does_not_depend_on_standard_error(
    stream: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Checkpoint(w=torch.ones(3)).write(tmp_path / "a")
    live = Checkpoint(w=torch.zeros(3))
    monkeypatch.setattr(progress, "_MIN_NBYTES", 0)
    monkeypatch.setattr(sys, "stderr", stream)
    live.read(path).assert_consumed()
    assert live.write(tmp_path / "b")
    assert torch.equal(live.w, torch.ones(3))


def test_a_terminal_sees_it_and_only_that_of_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    for rank in (0, 1):
        monkeypatch.setattr(sys, "stderr", terminal := _Terminal())
        with progress.progress_bar(rank, "save", 256 << 20) as moved:
            assert (moved is None) == (rank == 1)
            if moved is not None:
                moved(128 << 20)
        assert ("distckpt save" in terminal.getvalue()) == (rank == 0)


def test_a_terminal_that_hangs_up_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := _HangsUpLater())
    with progress.progress_bar(0, "restore", 256 << 20):
        pass
    assert terminal.getvalue()


def test_what_the_body_raises_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", _Terminal())
    with pytest.raises(KeyError), progress.progress_bar(0, "save", 256 << 20):
        raise KeyError
