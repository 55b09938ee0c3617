"""The web page (extra `ui`): the four tasks in Gradio, over one pipeline."""
