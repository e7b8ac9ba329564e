"""How short a step can be at best."""
