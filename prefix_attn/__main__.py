"""``python -m prefix_attn`` is the command ``prefix-attn``."""

from prefix_attn.cli.main import app

if __name__ == "__main__":
    app(prog_name="prefix-attn")
