"""`locas report`: results.json into tables and plots."""
