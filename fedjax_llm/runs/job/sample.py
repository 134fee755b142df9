"""The sample answer of a run: one prompt, before and after."""

import dataclasses
from collections.abc import Sequence

from fedjax_llm.data import Record, prompt_text
from fedjax_llm.federation import Federation, FederationState
from fedjax_llm.models import Model, generate
from fedjax_llm.runs.events import OnEvent, Stage
from fedjax_llm.runs.folder.summary import Sample
from fedjax_llm.runs.sections.schema import RunFile


def sample(
    run_file: RunFile,
    base: Model,
    federation: Federation,
    states: Sequence[FederationState],
    on_event: OnEvent,
) -> Sample | None:
    """One answer of the model as it was and as it has become; of the first cloud's, if it differs.

    Args:
        run_file: holds the prompt.
        base: the model.
        federation: says what a state's model is.
        states: before and after.
        on_event: is told.
    """
    prompt = run_file.evaluation.prompt
    if prompt is None:
        return None
    on_event(Stage("answer", prompt))
    training, tokenizer = run_file.training, base.tokenizer
    record = Record(prompt=prompt, answer="")
    ids = tokenizer.encode(
        prompt_text(record, tokenizer, training.template, training.system_prompt)
    )
    answers = []
    for state in states:
        weights, adapter = federation.model_of(state, federation.names[0])
        trained = dataclasses.replace(base, base=weights)
        tokens = generate(trained, adapter, ids, run_file.evaluation.max_new_tokens)
        answers.append(tokenizer.decode(tokens).strip())
    return Sample(prompt, *answers)
