"""The commands of `fedjax-llm`, in the order in which its help shows them."""

import typer

from fedjax_llm.cli import catalogues, jobs, plans, results
from fedjax_llm.cli import data as data_commands
from fedjax_llm.cli.launch import launch

app = typer.Typer(
    name="fedjax-llm",
    help="Federated fine-tuning of large language models: private, encrypted, exact.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command()(jobs.run)
app.command()(jobs.resume)
# The words after `launch` are those of another command.
app.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})(
    launch
)
app.command()(results.report)
app.command()(results.compare)
app.command()(plans.epsilon)
app.command()(plans.plan)
app.command()(plans.sweep)
app.command()(results.audit)
app.command()(results.export)
app.command()(catalogues.rules)
app.command()(catalogues.clouds)
app.command()(catalogues.doctor)

models = typer.Typer(help="Models by name.", no_args_is_help=True)
models.command("get")(catalogues.models_get)
models.command("list")(catalogues.models_list)
app.add_typer(models, name="models")

data = typer.Typer(help="Data and tokenizers, before a run.", no_args_is_help=True)
data.command("inspect")(data_commands.inspect)
data.command("partition")(data_commands.partition)
data.command("tokenizer")(data_commands.tokenizer)
app.add_typer(data, name="data")
