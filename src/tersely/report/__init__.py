"""What a run did: rows and JSON, the model card, the HTML page."""
