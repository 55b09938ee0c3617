"""The API server in OpenAI's shapes (extra `serve`), over one pipeline."""
