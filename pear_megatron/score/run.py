"""ScoreJob: from the input files to the scored Parquet file, resumable at any moment."""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict

import numpy as np
import torch

from pear_megatron.data.errors import DataError
from pear_megatron.data.prepare import describe_split
from pear_megatron.data.topk import TopK
from pear_megatron.data.trajectory import Trajectory
from pear_megatron.errors import ScoreError
from pear_megatron.megatron.checkpoint.model_folder import read_model_facts
from pear_megatron.progress import token_progress
from pear_megatron.ranks import check_same_on_every_rank, check_shared, is_main, same_on_every_node
from pear_megatron.score.backends import Scorer, load_scorer
from pear_megatron.score.chunks import WorkFolder, read_finished, trajectories_of
from pear_megatron.score.manifest import refuse_other, same_identity
from pear_megatron.score.ranks import Ranks
from pear_megatron.score.source import NOTE, ScoreSettings, Source
from pear_megatron.watch import working

log = logging.getLogger("pear_megatron")


class ScoreJob:
    """One `score` command on one rank: ``prepare``, then, unless that says that all is done, ``score``."""

    def __init__(self, settings: ScoreSettings) -> None:
        self.settings = settings
        self._work = WorkFolder(settings.output)
        self._weights: str | None = None  # their digest, of the rank that has read it

    def prepare(self) -> bool:
        """On rank 0: checks and tokenises all rows, unless that is done -> whether the output is finished already."""
        settings = self.settings
        if settings.output.suffix != ".parquet":
            raise ScoreError(
                f"--output {settings.output} must end in .parquet, by which training knows what it is"
            )
        source = Source(settings)
        identity = source.identity
        self._weights = source.weights
        if settings.output.exists() and not settings.overwrite:
            finished = read_finished(settings.output)
            if finished is None:
                raise ScoreError(
                    f"{settings.output} exists and `score` did not write it; choose another --output, or give "
                    "--overwrite"
                )
            refuse_other(finished[0], identity, str(settings.output))
            self._work.remove()
            log.info("%s is finished already: %s", settings.output, _said(finished[1]))
            return True
        there = self._work.read_identity()
        if there is not None and not settings.overwrite:
            refuse_other(there, identity, f"the unfinished work in {self._work.path}")
        if there is None or not same_identity(there, identity):
            self._work.start(identity)
        if not self._work.has_chunks():
            try:
                self._write_chunks(source)
            except (DataError, OSError):
                self._work.remove()
                raise
        return False

    def _write_chunks(self, source: Source) -> None:
        counts: Counter[str] = Counter()
        self._work.write_chunks(
            source.rows(counts),
            counts,
            max_rows=self.settings.chunk_rows,
            max_tokens=self.settings.chunk_tokens,
        )

    def num_missing(self) -> int:
        """Chunks that a model has yet to score, after ``prepare``."""
        if self.settings.backend == "import":
            return 0
        return len(self._work.missing_parts(len(self._work.read_index()[0])))

    def score(self, ranks: Ranks) -> None:
        """On every rank: scores the missing chunks, on all replicas, and joins them into the output."""
        if ranks.size > 1:
            lie_elsewhere = ("data", "model", "output", "tokenizer")
            check_same_on_every_rank(asdict(self.settings), may_differ=lie_elsewhere)
            same_on_every_node("weights in --model", self._read_weights)
            check_shared(self._work.path, "--output's work folder")
        chunks, counts = self._work.read_index()
        tokens = [chunk.tokens for chunk in chunks]
        missing = ranks.from_main(lambda: self._work.missing_parts(len(chunks)) if self.num_missing() else [])
        if is_main() and self.settings.top_k:
            decisions = sum(chunk.decisions for chunk in chunks)
            size = 8 * self.settings.top_k  # an int32 and a float32 each
            log.info("--top-k: %d bytes per decision, %.3g GB in all", size, size * decisions / 1e9)
        if missing:
            if is_main() and len(missing) < len(chunks):
                log.info("continuing: %d of %d chunks are scored", len(chunks) - len(missing), len(chunks))
            self._score(missing, tokens)
        ranks.wait()
        if is_main():
            counts["decisions"] = sum(chunk.decisions for chunk in chunks)
            scored = self.settings.backend != "import"
            self._work.finish(counts, len(chunks), scored=scored)
            log.info("wrote %s: %s", self.settings.output, _said(counts))
        ranks.wait()

    def _read_weights(self) -> str | None:
        model = self.settings.model
        return self._weights or (read_model_facts(model).digest if model else None)

    def _score(self, missing: list[int], tokens: list[int]) -> None:
        settings = self.settings
        assert settings.model is not None
        with working("loading the model"):
            scorer = load_scorer(
                settings.model,
                backend=settings.backend,
                tensor_parallel=settings.tensor_parallel,
                pipeline_parallel=settings.pipeline_parallel,
                dtype=settings.dtype,
                max_tokens_per_batch=settings.max_tokens_per_batch,
            )
        mine = missing[scorer.replica :: scorer.num_replicas]
        total = sum(tokens[k] for k in mine)
        with token_progress(total, replicas=scorer.num_replicas, show=is_main()) as advance:
            for k in mine:
                chunk = self._work.read_chunk(k)
                try:
                    found = _scored(scorer, trajectories_of(chunk), settings.top_k, advance)
                except ScoreError as error:
                    _say_for_rank_0(error, scorer)
                    raise
                if scorer.writes:
                    self._work.write_part(k, chunk, f"{settings.write_as}_logprobs", *found)


def _scored(
    scorer: Scorer, trajectories: list[Trajectory], top_k: int, advance: Callable[[int], object]
) -> tuple[list[np.ndarray], list[TopK]]:
    try:
        return scorer(trajectories, top_k, on_tokens=advance)
    except torch.cuda.OutOfMemoryError as error:
        raise ScoreError(
            "the GPU's memory is too small for a batch: give a lower --max-tokens-per-batch (default 16384) or a "
            "higher --tensor-parallel; what is scored is kept"
        ) from error


def _say_for_rank_0(error: ScoreError, scorer: Scorer) -> None:
    """Rank 0 prints a command's errors, but knows only those of its own replica, and its own memory."""
    own = isinstance(error.__cause__, torch.cuda.OutOfMemoryError)
    if not is_main() and (own or scorer.writes):
        print(f"error: {error}", file=sys.stderr, flush=True)


def _said(counts: Mapping[str, int]) -> str:
    """The counts in words."""
    texts = [f"{counts['rows']:,} rows, {counts.get('decisions', 0):,} decisions"]
    for name, text in (
        ("replaced", "had log-probs of their own, replaced"),
        ("truncated", "are marked truncated (training drops them unless data.truncated=keep)"),
        ("overlong", "were over-long and dropped"),
    ):
        if counts.get(name):
            texts.append(f"{counts[name]:,} {text}")
    if split := describe_split(counts):
        texts.append(split)
    texts += [
        f"{name.removeprefix(NOTE)}: {count:,}" for name, count in counts.items() if name.startswith(NOTE)
    ]
    return "; ".join(texts)
