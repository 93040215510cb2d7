"""The training loop, on one screen."""

import time

from megacm3.errors import Stopped
from megacm3.parallel.replicated import check_replicas
from megacm3.training.guards import check_finite
from megacm3.training.metrics import Metrics
from megacm3.training.ranks import Ranks
from megacm3.training.run import Run
from megacm3.training.schedule import learning_rate
from megacm3.training.signals import StopRequest


def train(run: Run) -> None:
    """Train from where the run stands to train.steps (or train.stop_at), saving as the config says.

    Raises Stopped after a signal (everything is saved) and Diverged when the loss is no longer finite.
    """
    config = run.config
    last = run.last_step
    stop = StopRequest(run.context)
    with Metrics(config, run.out, run.step, run.is_main, Ranks(run.engine), str(run.context)) as metrics:
        batches = iter(run.loader())
        while run.step < last:
            waiting = time.monotonic()
            batch = next(batches)
            metrics.waited(time.monotonic() - waiting)

            lr = learning_rate(config, run.step)
            run.engine.set_lr(lr)
            result = run.engine.train_step(batch.micro_batches)
            check_finite(result, run.step + 1, batch)
            run.advance()
            run.evaluate(metrics)

            metrics.add(run.step, result, lr, batch.samples_sha256, batch.counts, run.tokens)
            if run.step % config.log.replicas_every == 0:
                check_replicas(run.engine.module, run.context)
            stopping = stop.agreed()
            run.poll(metrics)
            if stopping or run.step == last or (config.checkpoint.every and run.step % config.checkpoint.every == 0):
                run.save(metrics)
            if stopping and run.step < last:
                run.finish(metrics)
                raise Stopped(f"stopped by a signal at step {run.step}, saved; run the same command to continue")
        run.finish(metrics)
