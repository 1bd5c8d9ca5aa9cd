"""Ray Train from start to end: workers that die start again from the newest checkpoint, as many as there can be."""

import logging
import os
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any, Literal

from goal_ray.checkpoints import (
    STATE_FILE,
    checkpoint_folder,
    checkpoint_folders,
    newest_intact,
    prune_checkpoints,
    saved_log,
    step_of,
)
from goal_ray.errors import GoalRayError, StageError
from goal_ray.events import event
from goal_ray.ray_session import is_joined
from goal_ray.train.config import TrainConfig
from goal_ray.train.driver_lock import SEEN_S, DriverLock, not_shared
from goal_ray.train.evaluation import Evaluations
from goal_ray.train.failures import WorkerDied, first_line, own_error
from goal_ray.train.mailbox import open_mailbox
from goal_ray.train.network import process_group
from goal_ray.train.places import (
    INGEST,
    Demand,
    beside_evaluation,
    cluster_resources,
    draining_nodes,
    evaluation_places,
    growth,
    lacking,
    most_workers,
    number_of,
)
from goal_ray.train.recorder import RunRecorder
from goal_ray.train.worker import worker_entry

Ending = Literal["finished", "early", "interrupted", "spoiled", "preempted", "resized"]
POLL_S = 0.5
LOOK_S = 0.1
SETTLED_S = 2.0
LOOK_AROUND_S = 5.0
SCRAPED_S = 25.0  # Ray's agents hand metrics on every 10 s, Prometheus asks for them every 10 s
GROW_AFTER_S = 30.0


class Attempts:
    """Runs the workers until the training ends.

    job          fields of `goal_ray.train.loop.Job` that every attempt shares
    most_bad     how many samples of the run may be unusable
    interrupted  set when the run is to save a checkpoint and end
    lock         by which the run folder is this driver's
    """

    def __init__(
        self,
        config: TrainConfig,
        job: dict[str, Any],
        most_bad: int,
        use_gpu: bool,
        recorder: RunRecorder,
        evaluations: Evaluations,
        interrupted: threading.Event,
        lock: DriverLock,
    ):
        self.config = config
        self.job = job
        self.run_dir: Path = job["run_dir"]
        self.most_bad = most_bad
        self.use_gpu = use_gpu
        self.recorder = recorder
        self.evaluations = evaluations
        self.interrupted = interrupted
        self.lock = lock
        self.nodes: set[str] = set()
        self.looked_around = 0.0
        self.room_since: float | None = None
        self.grow_after_s = GROW_AFTER_S
        self.lack = ""
        self.newest_saved = -1
        self.nonfinite = False

    def run(self, resume_from: Path | None) -> Ending:
        """Trains to the end, or until early stopping, an interruption or too many bad samples.

        Raises what no new attempt can mend.
        """
        failures = 0
        workers = self._wait_for_workers()
        while True:
            first_step = 0 if resume_from is None else step_of(resume_from)
            self.recorder.rewind(first_step, [] if resume_from is None else saved_log(resume_from))
            self.newest_saved = first_step  # those beyond it are damaged
            try:
                ending = self._attempt(resume_from, workers)
                if ending not in ("preempted", "resized"):
                    return ending
                resized = ending == "resized"
                self._restarting(ending)
                self.recorder.line.say(f"{ending} after step {self.newest_saved}")
            except Exception as error:
                own, resized = own_error(error, self.run_dir), False
                failures = 1 if self.newest_saved > first_step else failures + 1
                if isinstance(own, GoalRayError) and not isinstance(own, WorkerDied):
                    if self.nonfinite and is_joined():
                        time.sleep(SCRAPED_S)  # or the alert would never see why the run ended
                    raise own from error
                if not isinstance(own, WorkerDied | RuntimeError):
                    raise own from error
                if self.newest_saved >= self.job["total_steps"]:  # nothing is left to do for other workers
                    return "finished"
                if failures > self.config.max_failures:
                    raise own from error
                self._restarting(first_line(own))
                self.recorder.line.say(
                    f"{first_line(own)}; restart {failures} of {self.config.max_failures} without progress allowed"
                )
            resume_from = newest_intact(self.run_dir, self.recorder.line.say)
            before, workers = workers, self._wait_for_workers()
            if resized:  # in vain where other work was faster, or no node has what all nodes have together
                self.grow_after_s = GROW_AFTER_S if workers > before else 2 * self.grow_after_s
            self.recorder.line.say(f"going on with {number_of(workers)}")

    def _restarting(self, reason: str) -> None:
        self.recorder.prometheus.count("restarts")
        event("train", str(self.run_dir), "workers start again", logging.WARNING, reason=reason, step=self.newest_saved)

    def _attempt(self, resume_from: Path | None, workers: int) -> Ending:
        """One group of workers. Raises what they met, or a StageError that is no WorkerDied for what the driver met.

        Ray Train runs in a thread of its own: from the main thread it would take over Ctrl-C.
        """
        import ray
        from ray.exceptions import RayError

        mailbox = open_mailbox()
        trainer = self._trainer({**self.job, "resume_from": resume_from}, mailbox, workers)
        failures: list[BaseException] = []

        def fit() -> None:
            try:
                trainer.fit()
            except BaseException as error:
                failures.append(error)

        self.recorder.line.show(f"starting {number_of(workers)}")
        self.recorder.count_time()
        self.recorder.workers = workers
        self.recorder.cost.gpus = self.use_gpu  # from their start on, of which the workers tell only later
        self.nodes.clear()
        self.room_since = None
        thread = threading.Thread(target=fit, daemon=True)
        thread.start()
        ending: Ending = "finished"
        more = Demand()
        try:
            while thread.is_alive():
                thread.join(POLL_S)
                for record in ray.get(mailbox.take.remote()):
                    self._receive(record)
                # The workers choose their places first: what is left is the evaluation's.
                self.evaluations.poll(may_start=bool(self.nodes) and ending == "finished")
                self.recorder.count_time()
                self.recorder.line.tick()
                if ending == "finished" and (wish := self._reason_to_end(workers, more)) is not None:
                    ending = wish
                    ray.get(mailbox.stop.remote())
                # What is asked for takes the places it finds: only when the workers have theirs, and not for long,
                # or the ingest would wait for its CPUs.
                asks = self.nodes and self.room_since is None and ending == "finished" and is_joined()
                evaluating = self.evaluations.has_place
                more.want(growth(self.config, self.use_gpu, workers, evaluating) if asks else [])
            for record in ray.get(mailbox.take.remote()):
                self._receive(record)
        except (RayError, RuntimeError) as error:
            if not failures:  # the workers live, and others beside them would write into the same folder
                raise StageError(
                    f"the driver, not a worker, failed ({type(error).__name__}: {first_line(error)}); its mailbox or "
                    f"the cluster may be gone; go on with --resume; run folder: {self.run_dir}"
                ) from error
        finally:
            more.want([])
            self.recorder.count_time()
            self.recorder.workers = 0
            ray.kill(mailbox)
        if failures:
            raise failures[0]
        return ending if self.newest_saved < self.job["total_steps"] else "finished"

    def _trainer(self, job: dict[str, Any], mailbox: Any, workers: int) -> Any:
        # Restarts and preemptions are this class's affair: it knows which counts of workers share a batch.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer

        fields = {name: value for name, value in job.items() if name != "total_steps"}
        return TorchTrainer(
            partial(worker_entry, fields, mailbox, self.use_gpu, self.lock),
            scaling_config=ScalingConfig(
                num_workers=workers,
                use_gpu=self.use_gpu,
                resources_per_worker=self.config.worker_bundle(self.use_gpu),
            ),
            torch_config=process_group("nccl" if self.use_gpu else "gloo"),
            run_config=RunConfig(
                name="ray",
                storage_path=str(self.run_dir),
                # or it would try to start the same number of workers for ever
                failure_config=FailureConfig(controller_failure_limit=0),  # type: ignore[call-arg]  # known to v2's
            ),
        )

    def _receive(self, record: dict[str, Any]) -> None:
        """Takes one record from a worker."""
        if "bad" in record:
            self.recorder.quarantine(record["bad"])
        elif "doing" in record:
            self.recorder.line.show(record["doing"])
        elif "node" in record:
            self.nodes.add(record["node"])
        elif "nonfinite" in record:
            if not self.nonfinite:  # every worker tells
                self.recorder.prometheus.count("nonfinite_losses")
                event("train", str(self.run_dir), "loss is not finite", logging.ERROR, step=record["nonfinite"])
            self.nonfinite = True
        elif "device" in record:
            self.recorder.describe(record)
        elif "saved" in record:
            self._check_saved(record["saved"])
            self.newest_saved = max(self.newest_saved, record["saved"])
            self.recorder.prometheus.set("checkpoint_step", self.newest_saved)
            event("train", str(self.run_dir), "checkpoint saved", step=record["saved"])
            self.evaluations.add(record["saved"])
            prune_checkpoints(self.run_dir, self.config.keep_checkpoints, self.evaluations.needed)
        else:
            self.recorder.log(record)

    def _check_saved(self, step: int) -> None:
        """Raises StageError where a worker's checkpoint is not here; one that newer ones have replaced need not be."""
        folder, until = checkpoint_folder(self.run_dir, step), time.monotonic() + SEEN_S
        while not (folder / STATE_FILE).exists():
            if any(step_of(other) > step for other in checkpoint_folders(self.run_dir)):
                return
            if time.monotonic() > until:
                raise not_shared(self.run_dir, f"a worker has saved {folder.name}, and the driver does not find it")
            time.sleep(LOOK_S)

    def _reason_to_end(self, workers: int, more: Demand) -> Ending | None:
        """Why this group of workers should save a checkpoint and end, if it should; `more` is wanted beside it."""
        import ray

        if self.interrupted.is_set():
            return "interrupted"
        if len(self.recorder.bad) > self.most_bad:  # a worker stops by itself only for what it alone has met
            return "spoiled"
        if self.evaluations.out_of_patience:
            return "early"
        now = time.monotonic()
        if now - self.looked_around < LOOK_AROUND_S:
            return None
        self.looked_around = now
        self.lock.check_held()
        leaving = draining_nodes()
        if ray.get_runtime_context().get_node_id() in leaving:  # this process ends with its node, whatever it does
            self.recorder.line.say("the driver's node is about to go: saving a checkpoint, to go on from with --resume")
            self.interrupted.set()
            return "interrupted"
        if self.nodes & leaving:
            return "preempted"
        lack = lacking(self.config, self.use_gpu, workers, cluster_resources())
        if lack and lack != self.lack:  # a node on which no worker was is gone
            self.recorder.line.say(f"{lack}; waiting for more")
        self.lack = lack
        if self.room_since is None and any(more.found()):
            self.room_since = now
        if self.room_since is not None and now - self.room_since > self.grow_after_s:
            have = beside_evaluation(self.config, cluster_resources())
            if (most_workers(self.config, self.use_gpu, have) or 0) > workers:
                return "resized"
            self.room_since = None
        return None

    def _wait_for_workers(self) -> int:
        """How many workers to start: as many as find places now. Asks and waits for nodes where the fewest do not.

        Ray is asked for the places themselves: what its nodes have in all may be other work's, or a dead node's whose
        end it has not noticed.
        """
        bundle, counts = self.config.worker_bundle(self.use_gpu), self.config.worker_counts
        # One that runs has its place; the next one's is left free, or the run would go over to it again and again.
        evaluation = evaluation_places(self.config) if self.evaluations.running is None else []
        fewest, beside, others = Demand(), Demand(), Demand()
        try:
            fewest.want([[bundle] * counts[0] + [INGEST]])
            self._wait_for(fewest)
            have = beside_evaluation(self.config, cluster_resources())
            most = most_workers(self.config, self.use_gpu, have) or counts[0]
            if most > counts[0]:
                # As one group: Ray then leaves the nodes that suit workers alone to them.
                fewest.want([[bundle] * most + [INGEST] + evaluation])
                if all(settled(fewest)):
                    return most
                fewest.want([[bundle] * counts[0] + [INGEST]])
                self._wait_for(fewest)
            # One after the other, or what is wanted beside the fewest could take places that these need.
            if len(counts) > 1:
                beside.want([[each] for each in evaluation])
                settled(beside)
            others.want([[bundle]] * (counts[-1] - counts[0]))
            found = settled(others)
        finally:
            for demand in (fewest, beside, others):
                demand.want([])
        return max(count for count in counts if count <= counts[0] + sum(found))

    def _wait_for(self, fewest: Demand) -> None:
        """Waits until the fewest workers have their places. Raises StageError after `wait_for_nodes_s`."""
        began = time.monotonic()
        while not all(fewest.found()):
            if self.interrupted.is_set():
                raise StageError("interrupted while waiting for nodes; go on with --resume")
            lack = lacking(self.config, self.use_gpu, self.config.worker_counts[0], cluster_resources())
            lack = lack or "other work holds the places"
            waited_s = time.monotonic() - began
            if waited_s > self.config.wait_for_nodes_s:
                raise StageError(
                    f"{lack}, and there have not been more for {self.config.wait_for_nodes_s:.0f} s; go on with "
                    "--resume when there are, or raise wait_for_nodes_s"
                )
            if waited_s > SETTLED_S:
                self.recorder.line.show(f"waiting for nodes: {lack}")
            self.evaluations.poll(may_start=False)  # one that has ended holds its place until then
            self.recorder.count_time()
            time.sleep(LOOK_S)


def settled(demand: Demand) -> list[bool]:
    """Which of a demand's groups have their places, once all have or no more do for SETTLED_S seconds."""
    found, since = demand.found(), time.monotonic()
    while not all(found) and time.monotonic() - since < SETTLED_S:
        time.sleep(LOOK_S)
        before, found = found, demand.found()
        since = since if found == before else time.monotonic()
    return found
