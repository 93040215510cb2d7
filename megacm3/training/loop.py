"""The training loop, on one screen."""

import time

from megacm3.errors import Diverged, Stopped
from megacm3.training.guards import RollBack
from megacm3.training.metrics import Metrics
from megacm3.training.ranks import Ranks
from megacm3.training.run import Run
from megacm3.training.schedule import learning_rate
from megacm3.training.signals import StopRequest


def train(run: Run) -> None:
    """Train from where the run stands to its last step, saving as the config says.

    Raises Stopped after a signal (everything is saved) and Diverged when the guards give up.
    """
    stop = StopRequest(run.context, run.watchdog)
    while run.step < run.last_step:
        layout, ranks = str(run.context), Ranks(run.engine)
        try:
            with Metrics(run.config, run.out, run.step, run.is_main, ranks, layout) as metrics:
                _steps(run, stop, metrics)
        except RollBack as wish:
            run.roll_back(wish)
        except Diverged:
            run.keep_what_is_saved()
            raise


def _steps(run: Run, stop: StopRequest, metrics: Metrics) -> None:
    config, phase = run.config, run.watchdog.phase
    batches = iter(run.loader())
    while run.step < run.last_step:
        phase("data", run.step + 1)
        waiting = time.monotonic()
        batch = next(batches)
        metrics.waited(time.monotonic() - waiting)

        lr = learning_rate(config, run.step)
        run.engine.set_lr(lr)
        applied = False
        if not run.guards.leaves_out(run.step + 1):
            result = run.engine.train_step(batch.micro_batches, run.guards.is_spike)
            applied = run.guards.passed(run, batch, result)
        run.advance(batch)
        run.evaluate(metrics)

        if applied:
            metrics.add(run.step, result, lr, batch.samples_sha256, batch.counts, run.tokens)
        if run.step % config.log.replicas_every == 0:
            run.check_replicas()
        run.stopping = stop.agreed()
        phase("save", run.step)
        run.poll(metrics)
        if run.stopping or run.save_is_due:
            run.save(metrics)
        if run.stopping and run.step < run.last_step:
            run.finish(metrics)
            raise Stopped(f"stopped by a signal at step {run.step}, saved; run the same command to continue")
    run.finish(metrics)
