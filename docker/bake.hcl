# The images: `docker buildx bake -f docker/bake.hcl [cpu|cuda|multi-gpu|STACK-sandbox|STACK-workspace|grader]`.
# `make images` fills in the variables.
variable "COMMIT" { default = "unknown" }
variable "VERSIONS" { default = "{}" }
# A folder of wheels that are taken before any index, and a file with CA certificates; both optional.
variable "WHEELS" { default = "" }
variable "CA" { default = "" }
variable "BASE" { default = "debian:bookworm-slim" }

group "default" { targets = ["cpu"] }
group "cpu" { targets = ["cpu-sandbox", "cpu-workspace"] }
group "cuda" { targets = ["cuda-sandbox", "cuda-workspace"] }
group "multi-gpu" { targets = ["multi-gpu-sandbox", "multi-gpu-workspace"] }

group "grader" { targets = ["service", "database"] }

target "grader-image" {
  name       = purpose
  matrix     = { purpose = ["service", "database"] }
  context    = "."
  dockerfile = "docker/Dockerfile"
  target     = purpose
  args       = { BASE = BASE, COMMIT = COMMIT }
  secret     = CA != "" ? ["id=ca,src=${CA}"] : []
  tags       = ["topeka-${purpose}:latest"]
  platforms  = ["linux/amd64"]
}

target "image" {
  name       = "${stack}-${purpose}"
  matrix     = { stack = ["cpu", "cuda", "multi-gpu"], purpose = ["sandbox", "workspace"] }
  context    = "."
  dockerfile = "docker/Dockerfile"
  target     = purpose
  args       = { STACK = stack, BASE = BASE, COMMIT = COMMIT, VERSIONS = VERSIONS }
  contexts   = WHEELS != "" ? { wheels = WHEELS } : {}
  secret     = CA != "" ? ["id=ca,src=${CA}"] : []
  tags       = ["topeka-${purpose}:${stack}"]
  platforms  = ["linux/amd64"]
}
