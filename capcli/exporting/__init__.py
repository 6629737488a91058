"""One model in many forms, each opened again and compared before it counts."""
