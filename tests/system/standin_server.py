"""A Flower ServerApp for tests: sends what its settings say, writes down what came back."""

import json
import time
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

import server.app
from common.messages import AlignRequest, EvaluateRequest, HelloRequest, Request
from server.app import FlowerLink

app = ServerApp()

KINDS: dict[str, type[HelloRequest | AlignRequest | EvaluateRequest]] = {
    "hello": HelloRequest,
    "align": AlignRequest,
    "evaluate": EvaluateRequest,
}
ARRAYS = {"update", "head_importance", "head_mmd2", "neuron_importance"}


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Send every step to every farm and write the report."""
    settings = json.loads(Path(str(context.run_config["settings"])).read_text())
    with FlowerLink(grid) as link:
        while len(link.online()) < settings["farms"]:
            time.sleep(0.2)
        requests: list[Request] = [
            KINDS[step.pop("kind")].model_validate(step) for step in settings["steps"]
        ]
        report = {"server.app": server.app.__file__, "steps": exchange(link, requests)}
    done = Path(settings["report"])
    done.with_suffix(".part").write_text(json.dumps(report))
    done.with_suffix(".part").replace(done)


def exchange(link: FlowerLink, requests: list[Request]) -> list[list[dict[str, Any]]]:
    """What came back, request by request."""
    steps: list[list[dict[str, Any]]] = [[] for _ in requests]
    waiting: dict[str, tuple[int, int]] = {}
    nodes = link.online()
    for number, request in enumerate(requests):
        for node in nodes:
            sent = link.send(node, request, 80.0)
            waiting[sent.message_id] = number, sent.size_bytes
    ends = time.monotonic() + 75
    while waiting and time.monotonic() < ends:
        for found in link.poll(list(waiting)):
            number, size = waiting.pop(found.message_id)
            reply = found.reply and found.reply.model_dump(mode="json", exclude=ARRAYS)
            item = {"reply": reply, "error": found.error, "malformed": found.malformed}
            steps[number].append({**item, "sent": size, "size": found.size_bytes})
        time.sleep(0.1)
    return steps
