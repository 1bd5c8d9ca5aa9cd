"""Templates to pages."""

from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from goal_ray import __version__
from goal_ray.pages.colours import colour
from goal_ray.pages.pictures import LABEL_RADIUS

# Signs that HTML and SVG forbid and terminals obey; a key or a caption can hold them.
CONTROLS = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\t\n\r"}


def render_page(template: str, **values: Any) -> bytes:
    """A page in UTF-8 from a template, by its path in goal_ray; values are escaped, and their control signs too."""
    html = _environment().get_template(template).render(values).translate(CONTROLS)
    return html.encode("utf-8", "replace")  # JSON can hold what UTF-8 cannot: half a surrogate pair


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("goal_ray", ""), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.globals.update(version=__version__, colour=colour, label_radius=LABEL_RADIUS)
    return environment
