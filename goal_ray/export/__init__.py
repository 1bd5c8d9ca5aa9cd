"""Export: a trained model as a folder that plain open_clip or plain transformers loads, with a model card."""
