"""What listens: an API in OpenAI's shapes (extra `serve`) and a web page (extra `ui`), over one pipeline."""
