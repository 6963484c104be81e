"""Replicas on Ray: `serve run ray_serve:deployment`, with MODEL, ADAPTERS and API_KEY in the environment."""

import os
from pathlib import Path

from ray import serve

from trimtab.serve.app import create_app
from trimtab.serve.guard import Access
from trimtab.serve.server import Settings, open_service
from trimtab.serve.vllm.engine import make_engine


def build():
    """The ASGI application of a replica."""
    settings = Settings(os.environ["MODEL"], folder=Path(os.environ["ADAPTERS"]))
    service = open_service(settings, make_engine({}))
    return create_app(service, Access(keys=[os.environ["API_KEY"]]))


@serve.deployment(num_replicas=2, ray_actor_options={"num_gpus": 1})
@serve.ingress(build)
class Trimtab:
    """A model in each replica."""


deployment = Trimtab.bind()
