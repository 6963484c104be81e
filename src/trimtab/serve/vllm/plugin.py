"""The entry point `vllm.general_plugins`: vLLM calls `register` in each of its processes.

Without the front end's settings in `additional_config`, and on requests that carry no edit, nothing is changed.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import threading

from trimtab.serve.vllm import keys, probe, worker

FRONT_END = "TRIMTAB_FRONT_END"
"""Of the environment: the id of the process that serves."""
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
    end_with_front_end()


def end_with_front_end() -> None:
    """End this process when the server that started it is gone, also by SIGKILL, which leaves it no time to say so.

    vLLM's engine process would go on with the device's memory; its workers notice that the engine has ended.
    """
    parent = multiprocessing.parent_process()
    if parent is None or str(parent.pid) != os.environ.get(FRONT_END):
        return

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, name="trimtab-front-end", daemon=True).start()
