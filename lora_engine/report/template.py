"""The report's pages, from the templates beside this file."""

from lora_engine.text import visible


def rendered(template: str, **values: object) -> str:
    """The page of a file in templates/, whose values are escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("lora_engine.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["visible"] = visible
    return environment.get_template(template).render(**values)
