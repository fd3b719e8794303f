"""Files, pictures, tables and messages: helpers that know nothing of the method."""
