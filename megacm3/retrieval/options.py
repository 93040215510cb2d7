"""What the builders of banks and of neighbour lists are told."""

from dataclasses import dataclass, field

from megacm3.data.executors import ExecutorOptions
from megacm3.errors import ConfigError
from megacm3.retrieval import backends
from megacm3.retrieval.neighbours import MAX_KEEP
from megacm3.retrieval.precomputed import PREFIX
from megacm3.tokenizers.image import torch_device

MAX_SEARCH = 1 << 16
"""Candidates looked at; a block's queries hold so many scores each."""


@dataclass(frozen=True, kw_only=True)
class WorkOptions:
    """How either is made."""

    batch: int = 64
    seed: int = 0
    workers: int = 0
    """Units at once; 0: one below 20,000 documents, else one a core."""
    device: str = "cpu"
    executor: str = "local"
    """Where units run: local, slurm or ray; nothing of it changes the bytes."""
    slurm: dict[str, str] = field(default_factory=dict)
    """Options of sbatch, as in `ExecutorOptions`."""
    overwrite: bool = False

    @property
    def where(self) -> ExecutorOptions:
        """For `run_units`."""
        return ExecutorOptions(self.executor, self.workers, device=self.device, slurm=self.slurm)


@dataclass(frozen=True)
class BankOptions(WorkOptions):
    """A bank to be made."""

    store: str
    encoder: str
    """A CLIP folder, or precomputed:DIR."""
    output: str
    inputs: tuple[str, ...] = ()
    """Paths and globs that the store was made from."""
    index: str = "auto"
    """A factory string of faiss, or another backend's own word; auto: by the number of documents."""
    backend: str = backends.FAISS
    """faiss, annoy, milvus or pinecone (backends.py)."""
    server: str = ""
    """Address of a Milvus server or of a Pinecone index."""
    shard_rows: int = 0
    """Vectors of an index shard; 0: by the number of documents (`index.shard_size`)."""
    nprobe: int = 0
    """Lists searched of an inverted file; 0: the fewest that reach the recall aimed at (recall.AIM), at most 1/16."""
    merge: bool = False
    """Merge the shards of an inverted file into one index on disk."""

    def check(self) -> None:
        """Raises ConfigError for values out of range and for backends that do not take them."""
        if self.shard_rows < 0 or self.batch < 1 or self.nprobe < 0:
            raise ConfigError("--batch must be at least 1, --shard-size and --nprobe at least 0")
        if not self.inputs and not self.encoder.startswith(PREFIX):
            raise ConfigError("--input is needed: the pictures and captions that the store was made from")
        self.where.check()
        torch_device(self.device)
        backends.check_backend(self.backend, self.server, self.merge)


@dataclass(frozen=True)
class NeighbourOptions(WorkOptions):
    """A neighbour folder to be made."""

    bank: str
    output: str
    encoder: str = ""
    """CLIP folder; empty: the bank's own copy."""
    queries: str = ""
    """A bank whose documents ask, made with the same encoder; empty: those of `bank` itself."""
    held_out: tuple[str, ...] = ()
    """Banks of held-out stores: documents of `bank` that are copies of theirs are never drawn."""
    keep: int = 16
    """Candidates kept in each list."""
    search: int = 64
    """Candidates looked at: copies of the document and of one another are left out of them."""
    text_variants: int = 2
    query_dropout: float = 0.2
    """Probability that a token of a text query is dropped (CM3Leon 2.1)."""
    alike: float = 0.9
    """Inner product of document vectors above which two candidates are not drawn together."""
    duplicate: float = 0.98
    """Inner product of document vectors from which two documents count as copies of each other."""
    block: int = 0
    """Documents of a unit; 0: by the number of documents."""

    def check(self) -> None:
        """Raises ConfigError for values out of range."""
        self.where.check()
        torch_device(self.device)
        if not 1 <= self.keep <= MAX_KEEP or not self.keep <= self.search <= MAX_SEARCH:
            raise ConfigError(
                f"--keep {self.keep} --search {self.search}; expected 1 <= keep <= {MAX_KEEP}, "
                f"keep <= search <= {MAX_SEARCH}"
            )
        if self.text_variants < 1 or not 0 <= self.query_dropout < 1:
            raise ConfigError(
                f"--text-variants {self.text_variants} --query-dropout {self.query_dropout}; "
                "expected at least 1 variant and a dropout of 0 or more, below 1"
            )
        if self.block < 0 or self.batch < 1:
            raise ConfigError(f"--block {self.block} --batch {self.batch}; expected block >= 0 and batch >= 1")
