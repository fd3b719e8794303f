"""Tasks that train the embedded teacher and its judge; FlowMatching also adapts other teachers."""
