"""What goes wrong at night, done on purpose."""
