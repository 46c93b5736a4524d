"""A part of a member's work that meets a fault of ours."""

import asyncio

import pytest

from ipamd.member import member
from ipamd.member.member import Member


def test_work_that_fails_begins_anew(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(member, "_PAUSE_S", 0.0)
    begun = 0
    at_work = asyncio.Event()

    async def work() -> None:
        nonlocal begun
        begun += 1
        if begun < 3:
            raise KeyError("a fault")
        at_work.set()
        await asyncio.Event().wait()

    async def run() -> None:
        one = Member.__new__(Member)  # of what it is made of this needs nothing
        task = asyncio.create_task(one._for_ever(work))
        await asyncio.wait_for(at_work.wait(), 30)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    assert begun == 3
    assert sum("begins anew" in record.getMessage() for record in caplog.records) == 2
