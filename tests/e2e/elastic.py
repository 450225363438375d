"""Train a run file on two real nodes; after the first checkpoint one is killed, or announced to go: `python elastic.py RUN kill|drain`."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

from ray.cluster_utils import Cluster

from vkd import pipeline, spot_notice
from vkd.run import Run, load_one
from vkd.spot_notice import Notice

DEADLINE_S = 60.0
NOTICED_SOON = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 500,
    "health_check_failure_threshold": 3,
}


def main(run_file: str, how: str) -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, "_system_config": NOTICED_SOON})
    try:
        nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
        run = load_one(run_file, [f"compute.address={cluster.address}"])
        threading.Thread(target=after_checkpoint, args=(run, nodes[1], how), daemon=True).start()
        trained = pipeline.distill(run, Mock())
        print(trained.num_examples)
    finally:
        cluster.shutdown()


def after_checkpoint(run: Run, node: Any, how: str) -> None:
    while not list(Path(run.output).glob("attempts/*/step-*/DONE")):
        time.sleep(0.05)
    if how == "drain":
        spot_notice.drain(Notice("spot terminate", time.time() + DEADLINE_S), node.address, node.node_id)
    else:
        os.kill(node.all_processes["raylet"][0].process.pid, signal.SIGKILL)


if __name__ == "__main__":
    main(*sys.argv[1:])
