"""The service around an engine that is loading; a second's work of imports and the tokenizer, beside its start."""

from dijiang_model.errors import ConfigError
from dijiang_model.text.folder import UnsupportedTokenizerError
from dijiang_model.text.template import TemplateSyntaxFailure
from server.grammar_check.checker import GrammarChecker
from server.options import ServiceOptions
from server.service import Service
from server.startup.assemble import grammar_limits, make_tracer, service_options
from server.startup.errors import StartError
from server.startup.prepare import Prepared
from server.text.tokenizer import Tokenizer, load_tokenizer


def make_service(prepared: Prepared) -> tuple[Service, Tokenizer | None]:
    """Reads the tokenizer.

    Raises:
        StartError: the tokenizer, the chat template, the keys or the tracer cannot be used.
    """

    def options() -> ServiceOptions:
        return service_options(settings, prepared.model, prepared.default_name)

    settings = prepared.settings
    try:
        tokenizer = load_tokenizer(prepared.model)
        service = Service(
            prepared.engine,
            options(),
            tokenizer,
            states=prepared.store,
            grammars=None if tokenizer is None else GrammarChecker(prepared.model, grammar_limits(settings)),
            read_again=lambda: (options(), load_tokenizer(prepared.model)),
            tracer=make_tracer(settings),
        )
    except (ConfigError, UnsupportedTokenizerError, TemplateSyntaxFailure) as error:
        raise StartError(str(error)) from error
    if tokenizer is None and settings.reasoning_parser == "think":
        raise StartError("reasoning_parser think has no effect: the model has no tokenizer")
    return service, tokenizer
