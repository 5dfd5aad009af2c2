"""The demo checkpoint: a few-million-parameter Gemma-3 trained on drawings of coloured shapes."""
