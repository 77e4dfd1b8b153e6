"""The rows of a report: what is compared, in the order of its tables. docs and README describe them."""

ROWS = ("pretrained", "finetuned", "ensemble", "merged", "distilled")
# Of every run; `distilled` is there only if the recipe says so.
NUM_ROWS = 4
# What the merged model, and the distilled one, are compared with.
BASELINES = ("pretrained", "finetuned")
