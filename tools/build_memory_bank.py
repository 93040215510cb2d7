"""Embed the captioned pictures of a store and index them: a memory bank, searched by text or picture."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megacm3.command import pairs, run
from megacm3.files import check_output


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--store", required=True, help="token store, made by tools/pretokenize.py")
    add("--input", nargs="+", default=[], metavar="GLOB|DATASET", help="what the store was made from")
    add(
        "--encoder",
        required=True,
        metavar="DIR|precomputed:DIR",
        help="CLIP folder, or vectors in clip-retrieval's layout (img_emb, text_emb, metadata with key)",
    )
    add("--output", required=True, metavar="BANK", help="bank to make; unfinished work lies in BANK.work")
    add(
        "--index", default="auto", metavar="FACTORY", help="faiss factory string, or a backend's own (default: by size)"
    )
    add("--backend", default="faiss", help="faiss, annoy, milvus or pinecone (default %(default)s)")
    add("--server", default="", metavar="URL", help="of a Milvus server, or of an index in Pinecone")
    add("--shard-size", type=int, default=0, metavar="N", help="vectors an index shard (default: chosen by size)")
    add("--nprobe", type=int, default=0, help="lists searched (default: the fewest with a recall@10 of 0.95)")
    add("--merge", action="store_true", help="merge the shards into one index on disk")
    add("--batch", type=int, default=64, help="pictures encoded at once (default %(default)s)")
    add("--workers", type=int, default=0, help="units at once (default: 1 for a small store, else one a core)")
    add("--executor", choices=("local", "slurm", "ray"), default="local")
    add("--slurm", nargs="+", default=[], metavar="KEY=VALUE", help="partition=NAME and other options of sbatch")
    add("--device", default="cpu", help="where pictures are encoded: cpu or cuda")
    add("--seed", type=int, default=0)
    add("--overwrite", action="store_true", help="replace a bank made from other inputs or settings")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Parse, run or continue the job, say what was made."""
    given = _parser().parse_args(arguments)
    check_output(given.output)

    from megacm3.retrieval.build_bank import build_bank
    from megacm3.retrieval.options import BankOptions

    report = build_bank(
        BankOptions(
            store=given.store,
            encoder=given.encoder,
            output=given.output.rstrip("/"),
            inputs=tuple(given.input),
            index=given.index,
            backend=given.backend,
            server=given.server,
            shard_rows=given.shard_size,
            nprobe=given.nprobe,
            merge=given.merge,
            batch=given.batch,
            seed=given.seed,
            workers=given.workers,
            device=given.device,
            executor=given.executor,
            slurm=pairs("--slurm", given.slurm),
            overwrite=given.overwrite,
        )
    )
    time = f"in {report.seconds:.1f} s" if report.seconds else "finished already"
    recall = ", ".join(f"recall@10 {value:.3f} by {kind}" for kind, value in report.recall.items()) or "exact"
    print(
        f"{given.output}: {report.rows} of {report.documents} documents, index {report.index}, {report.shards} shards, "
        f"{recall}, {time}"
    )
    return 0


if __name__ == "__main__":
    run(main)
