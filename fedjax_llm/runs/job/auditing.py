"""The audit of a run: what its noise really hides, beside what its accountant says.

What is audited is a twin of the run that nobody uses: the same code, plan and settings on the rows
of one cloud, or on stand-ins for the clients' messages, among which canaries stand by the toss of a
coin. So the model that the run trained has seen none of them.
"""

import functools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm.aggregation import AggregationRule, Round, ServerState
from fedjax_llm.audit import AuditReport, audit_clients, audit_examples
from fedjax_llm.audit.inversion import Inversion, invert
from fedjax_llm.data import Corpus
from fedjax_llm.errors import UserError
from fedjax_llm.federation import FederationState
from fedjax_llm.federation.keys import Purpose, key_for, seed_key
from fedjax_llm.federation.objective import row_loss
from fedjax_llm.models import Batch, Model
from fedjax_llm.privacy import PrivacyPlan, clip, gaussian_noise_like
from fedjax_llm.runs import build, report, runfile
from fedjax_llm.runs.events import Note, OnEvent, Stage, ignore
from fedjax_llm.runs.folder import RunFolder, audit_file, fingerprint
from fedjax_llm.runs.folder.checkpoints import Checkpoints
from fedjax_llm.runs.sections.evaluation import AuditSection
from fedjax_llm.runs.sections.privacy import no_audit
from fedjax_llm.runs.sections.schema import RunFile
from fedjax_llm.training import Drift

PyTree = Any


@dataclass(frozen=True)
class Read:
    """What an inversion attack read of one text.

    Attributes:
        seen: what the attacker holds.
        precision: share of the tokens read that are in the text.
        recall: share of the text's tokens that were read.
        text: what was read.
    """

    seen: str
    precision: float
    recall: float
    text: str


@dataclass(frozen=True)
class RunAudit:
    """What an audit found.

    Attributes:
        report: bounds on the epsilon of the twin.
        run_epsilon: the accountant's epsilon of the run itself.
        about: what was audited, in words.
        inversion: what attacks on one message read; empty if none was asked for.
    """

    report: AuditReport
    run_epsilon: float | None
    about: str
    inversion: tuple[Read, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """What audit.json holds."""
        found = asdict(self)
        found["report"]["statement"] = str(self.report)
        found["report"]["consistent"] = self.report.consistent
        return found

    def lines(self) -> list[str]:
        """For people."""
        lines = [f"{self.about}: {self.report}"]
        for read in self.inversion:
            lines.append(
                f"inversion, {read.seen}: {100 * read.recall:.0f} % of the tokens read, "
                f"{100 * read.precision:.0f} % of what was read is right"
            )
        return lines


def audit(
    run_file: RunFile,
    base: Model,
    corpora: list[Corpus],
    server: ServerState,
    rounds: int,
    asked: AuditSection,
) -> RunAudit:
    """Audits a run.

    Args:
        run_file: its settings.
        base: its model.
        corpora: its data.
        server: its last state; an inversion attack begins there.
        rounds: that it ran.
        asked: how it is audited.

    Raises:
        UserError: there is no unit, or the plan is of a kind that no audit is written for.
    """
    if (why := no_audit(run_file.privacy)) is not None:
        raise UserError(f"no audit is written for this run: {why}")
    units = [count for corpus in corpora for count in corpus.client_rows]
    plan = build.plan(run_file, units, base)
    spent = plan.report(rounds).epsilon
    if plan.unit == "client":
        found, about = _clients(run_file, server, plan, asked.rounds or rounds, asked)
        return RunAudit(found, spent, about)
    found, about = _examples(run_file, base, corpora, server, plan, asked.rounds or rounds, asked)
    reads = _inversion(run_file, base, corpora, server, plan) if asked.inversion else ()
    return RunAudit(found, spent, about, reads)


def _clients(
    run_file: RunFile, server: ServerState, plan: PrivacyPlan, rounds: int, asked: AuditSection
) -> tuple[AuditReport, str]:
    rule = build.rule(run_file)
    message = rule.messages(jax.eval_shape(lambda: server), 0)[0][0]
    clients = plan.units[0]
    key = key_for(seed_key(run_file.seed), Purpose.ADAPTER_INIT, 1)
    # Longer than the clip norm, as messages of clients that have something to say are.
    messages = jax.tree.map(
        lambda leaf: jax.random.normal(key, (clients, *leaf.shape), jnp.float32), message
    )
    report = audit_clients(
        messages,
        canaries=asked.canaries,
        rounds=rounds,
        clip_norm=plan.clip_norm,
        noise_multiplier=plan.noise_multiplier,
        delta=min(plan.delta, 0.5 / (clients + asked.canaries)),
        rate=1.0 if asked.full else plan.sampler.rates[0],
        seed=run_file.seed,
    )
    return report, (
        f"audit of the noised sum over {rounds} rounds of {clients} stand-ins and {asked.canaries} "
        f"canaries, {_sampled(asked, plan.sampler.rates[0])}"
    )


def _examples(
    run_file: RunFile,
    base: Model,
    corpora: list[Corpus],
    server: ServerState,
    plan: PrivacyPlan,
    rounds: int,
    asked: AuditSection,
) -> tuple[AuditReport, str]:
    # The cloud whose examples the accountant says most about.
    owners = [corpus for corpus in corpora for _ in corpus.client_rows]
    rate = max(plan.sampler.rates)
    corpus = owners[plan.sampler.rates.index(rate)]
    own: Batch = jax.tree.map(lambda leaf: jnp.asarray(leaf[: asked.rows]), corpus.train)
    real = own.tokens_BxT.shape[0]
    rows = real + asked.canaries
    training = build.local_training(run_file, base)
    # The same rate as in the run, so that the same epsilon is promised.
    batch = rows if asked.full else max(1, round(rate * rows))
    training = replace(
        training, batch_size=batch, microbatch=min(training.microbatch, batch), drift=Drift()
    )
    rule = build.rule(run_file)
    part = _start(rule, server, run_file)
    report = audit_examples(
        functools.partial(_loss, run_file, base, rule, server),
        base.base,
        part,
        own,
        training,
        canaries=asked.canaries,
        rounds=rounds,
        delta=min(plan.delta, 0.5 / rows),
        seed=run_file.seed,
    )
    if plan.unit == "user":
        report = replace(report, unit="user")
    steps = rounds * training.steps
    return report, (
        f"audit of a twin of {corpus.name!r}: {steps} steps on {real} of its rows and "
        f"{asked.canaries} canaries, {_sampled(asked, batch / rows)}"
    )


def _sampled(asked: AuditSection, rate: float) -> str:
    if asked.full:
        return "all of which take part in every step, unlike in the run: more can be seen"
    return f"sampled at rate {rate:.3g} like the run"


def _start(rule: AggregationRule, server: ServerState, run_file: RunFile) -> PyTree:
    """What a client of the next round would begin to train."""
    key = key_for(seed_key(run_file.seed), Purpose.RULE, 1)
    return rule.start(Round(server, 0, jnp.int32(1), key), jnp.int32(run_file.adapter.rank))


def _loss(
    run_file: RunFile,
    base: Model,
    rule: AggregationRule,
    server: ServerState,
    weights: PyTree,
    part: PyTree,
    row: Batch,
) -> jax.Array:
    dtype = jnp.dtype(run_file.model.dtype)
    adapter = rule.adapter(server, part)
    return row_loss(base, weights, adapter, row, dtype, run_file.training.remat)


def _inversion(
    run_file: RunFile,
    base: Model,
    corpora: list[Corpus],
    server: ServerState,
    plan: PrivacyPlan,
) -> tuple[Read, ...]:
    """Attacks on the gradient of one real row: as it is, and clipped and noised as in the run."""
    rule = build.rule(run_file)
    part = _start(rule, server, run_file)
    train = corpora[0].train
    lengths = np.asarray(train.segments_BxT > 0).sum(axis=1)
    row = jax.tree.map(lambda leaf: jnp.asarray(leaf[int(np.argmin(lengths))]), train)
    truth = [int(token) for token in np.asarray(row.tokens_BxT)[: int(lengths.min()) - 1]]
    loss = functools.partial(_loss, run_file, base, rule, server)
    gradient = jax.jit(jax.grad(loss, argnums=1))(base.base, part, row)
    key = key_for(seed_key(run_file.seed), Purpose.LOCAL_NOISE, 0)
    clipped, _ = clip(gradient, plan.clip_norm)
    noise = gaussian_noise_like(key, clipped, plan.noise_stddev)
    views = {
        "the gradient without protection": gradient,
        "clipped and noised as in the run": jax.tree.map(jnp.add, clipped, noise),
    }
    found = []
    for seen, update in views.items():
        read: Inversion = invert(
            base.config, base.base, rule.adapter(server, part), update, longest=len(truth)
        )
        precision, recall = read.overlap(truth)
        text = base.tokenizer.decode(read.tokens, skip_special_tokens=True)
        found.append(Read(seen, precision, recall, text))
    return tuple(found)


def audit_folder(path: Path, asked: AuditSection, *, on_event: OnEvent = ignore) -> RunAudit:
    """Audits the run in a folder, whose last state it loads, and writes the report again.

    Args:
        path: of the folder.
        asked: how it is audited.
        on_event: is told of stages and findings.

    Raises:
        UserError: no run, no checkpoint, other data or another model than it was trained with; no
            audit is written for its mechanism.
    """
    with RunFolder.open(path, write=True) as folder:
        run_file = runfile.load(folder.run_toml)
        run_file = run_file.model_copy(update={"audit": asked})
        base = build.model(run_file, on_event)
        corpora = build.corpora(run_file, base, on_event)
        found = Checkpoints(folder.checkpoints, run_file.checkpoint.keep).latest(
            like=build.state(run_file, base),
            notify=lambda text: on_event(Note(text)),
            part=True,
        )
        if found is None or found.round == 0:
            raise UserError(f"{path} has no round to audit yet; `fedjax-llm resume` it first")
        identity = fingerprint.of(run_file, base, corpora)
        fingerprint.check(found.metadata.get("fingerprint", {}), identity, folder.path)
        on_event(Stage("audit"))
        result = record(folder, run_file, base, corpora, found.tree, on_event)
        report.write(folder)
        return result


def record(
    folder: RunFolder,
    run_file: RunFile,
    base: Model,
    corpora: Sequence[Corpus],
    state: FederationState,
    on_event: OnEvent,
) -> RunAudit:
    """Audits a run as its [audit] says, tells what was found and writes it to the folder."""
    section = run_file.audit
    assert section is not None
    found = audit(
        run_file,
        base,
        list(corpora),
        state.server,
        int(state.round),
        section,
    )
    audit_file.write(folder, found.as_dict())
    for line in found.lines():
        on_event(Note(line))
    return found
