"""The entry point `vllm.general_plugins`: vLLM calls `register` in each of its processes.

Without the front end's settings in `additional_config`, and on requests that carry no edit, nothing is changed.
"""

from __future__ import annotations

import logging

from trimtab.serve.vllm import keys, probe, worker

_LOG = logging.getLogger(__name__)


def register() -> None:
    """Put edits and keys into this process, or leave vLLM as it is where it is not the one that was tested.

    The front end then refuses to start, since its workers lack the method that fills their tables.
    """
    wrong = probe.wrong()
    if wrong:
        _LOG.warning("trimtab serves no adapters on this vLLM: %s", "; ".join(wrong))
        return
    keys.install()
    worker.install()
