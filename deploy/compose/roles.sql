-- The users of the ledger's database, for psql as the superuser. What is there already stays; passwords are set anew.
-- docs/operating/roles.md tells who is who.
\set ON_ERROR_STOP on
\set owner_password `sed -n 's/^password=//p' "${SECRETS:-/run/secrets}/database_owner"`
\set server_password `sed -n 's/^password=//p' "${SECRETS:-/run/secrets}/database_server"`

SELECT format('CREATE ROLE %I %s', name, kind)
FROM (VALUES
    ('ledger', 'LOGIN'),
    ('peculium', 'LOGIN'),
    ('peculium_server', 'NOLOGIN'),
    ('peculium_auditor', 'NOLOGIN')
)
AS wanted (name, kind)
WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = name) \gexec

ALTER ROLE ledger PASSWORD :'owner_password';
ALTER ROLE peculium PASSWORD :'server_password';
GRANT peculium_server TO peculium;

SELECT 'CREATE DATABASE peculium OWNER ledger'
WHERE NOT EXISTS (SELECT FROM pg_database WHERE datname = 'peculium') \gexec

REVOKE CONNECT, TEMPORARY ON DATABASE peculium FROM PUBLIC;
GRANT CONNECT ON DATABASE peculium TO peculium, peculium_auditor;
