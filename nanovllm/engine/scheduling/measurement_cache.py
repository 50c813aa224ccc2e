"""Keeps what one engine has measured on disk for the next, by GPU, model, versions and options. No torch."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from nanovllm.utils.disk_cache import cache_folder, write_whole

logger = logging.getLogger(__name__)

Measured = TypeVar("Measured")


def cache_file(fingerprint: dict[str, Any]) -> Path:
    """The file of what was measured with this fingerprint, all that a measurement holds for.

    It is in `$XDG_CACHE_HOME/nanovllm/calibration`, by default `~/.cache/nanovllm/calibration`.
    """
    digest = hashlib.sha256(_as_json(fingerprint).encode()).hexdigest()[:16]
    gpu = re.sub(r"\W+", "-", str(fingerprint["gpu"])).strip("-").lower()
    return cache_folder("calibration") / f"{gpu}-{digest}.json"


def load(fingerprint: dict[str, Any], parse: Callable[[dict[str, Any]], Measured]) -> Measured | None:
    """What an earlier engine kept with this fingerprint; None if there is nothing usable.

    Args:
        fingerprint: has a `gpu`.
        parse: makes the result of what `keep` was given; raises whatever it likes if that is wrong.
    """
    try:
        path = cache_file(fingerprint)
        kept = json.loads(path.read_text(encoding="utf-8"))
        if _as_json(kept["about"]) != _as_json(fingerprint):
            return None
        measured = parse(kept)
    except FileNotFoundError:
        return None
    # Whatever is wrong with a file costs a measurement, not the start.
    except Exception as error:  # noqa: BLE001
        logger.warning("a kept calibration cannot be used (%s: %s)", type(error).__name__, error)
        return None
    logger.info("calibration from %s", path)
    return measured


def keep(fingerprint: dict[str, Any], content: dict[str, Any]) -> None:
    """Writes measurements to disk; if that fails, the next engine measures again."""
    try:
        path = cache_file(fingerprint)
        # Another engine may start at the same time.
        write_whole(path, json.dumps({"about": fingerprint, **content}, indent=1).encode())
    except (OSError, RuntimeError) as error:  # there need not be a home directory
        logger.warning("the calibration cannot be kept (%s)", error)
        return
    logger.info("calibration kept in %s", path)


def _as_json(fingerprint: dict[str, Any]) -> str:
    return json.dumps(fingerprint, sort_keys=True)
