-- The time of the cluster, in milliseconds since the Unix epoch. A function, so that a test can set Postgres' clock by
-- replacing it; NULL stands for a Postgres that is not asked. Every statement that destroys data by age compares with it.
CREATE FUNCTION store_now() RETURNS bigint LANGUAGE sql VOLATILE AS
$$ SELECT floor(extract(epoch FROM clock_timestamp()) * 1000)::bigint $$;
