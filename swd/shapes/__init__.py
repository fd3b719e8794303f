"""The embedded world of coloured shapes: its pictures, its teacher, its judge, and the demo on them."""
