"""What listens: the model behind an API and a web page. Thin, over the pipeline alone."""
