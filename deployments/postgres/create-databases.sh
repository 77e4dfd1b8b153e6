#!/bin/sh
# Run once by the postgres image, on an empty volume; the database of Prefect is POSTGRES_DB.
set -eu
createdb --username "$POSTGRES_USER" mlflow
