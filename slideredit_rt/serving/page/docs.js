// A file of its own, because the content security policy allows no inline scripts.
SwaggerUIBundle({
  dom_id: "#swagger-ui",
  url: "openapi.json",
  validatorUrl: null, // else the description is sent to a validator on the internet
  deepLinking: true,
});
