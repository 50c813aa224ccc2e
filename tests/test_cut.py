"""A block that a callback cuts short: only there, once, and whoever cancels the task is heard, too."""

from __future__ import annotations

import asyncio
import sys

import pytest

from nanovllm.entrypoints.server.cut import Cut


def test_a_strike_ends_the_block_and_not_the_task():
    async def main():
        with Cut() as cut:
            asyncio.get_running_loop().call_soon(cut.strike)
            await asyncio.sleep(60)
        assert cut.has_struck
        await asyncio.sleep(0)  # nothing is left of it
        return "went on"

    assert asyncio.run(main()) == "went on"


def test_a_strike_after_the_block_does_nothing():
    async def main():
        with Cut() as cut:
            await asyncio.sleep(0)
        cut.strike()
        await asyncio.sleep(0)
        return cut.has_struck

    assert asyncio.run(main()) is False


def test_a_strike_while_the_block_is_about_to_go_on_ends_it():
    async def main():
        event = asyncio.Event()
        with Cut() as cut:
            loop = asyncio.get_running_loop()
            loop.call_soon(event.set)
            loop.call_soon(cut.strike)
            await event.wait()
            await asyncio.sleep(60)
        return cut.has_struck

    assert asyncio.run(main()) is True


def test_errors_and_cancellations_of_others_come_out():
    async def fails():
        with Cut():
            raise ValueError("its own")

    async def cancelled(strikes):
        with Cut() as cut:
            if strikes:
                asyncio.get_running_loop().call_soon(cut.strike)
            asyncio.get_running_loop().call_soon(asyncio.current_task().cancel)
            await asyncio.sleep(60)

    with pytest.raises(ValueError, match="its own"):
        asyncio.run(fails())
    for strikes in (False, True) if sys.version_info >= (3, 11) else (False,):
        with pytest.raises(asyncio.CancelledError):
            asyncio.run(cancelled(strikes))
